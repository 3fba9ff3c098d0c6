"""seprune's scores inside other libraries."""
