"""A recipe carried out in a run folder, stage by stage; and many of them."""
