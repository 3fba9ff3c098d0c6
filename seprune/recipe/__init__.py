"""Recipes: one YAML file says everything a run does. Torch-free, so that mistakes show at once."""

from seprune.recipe.load import dump_recipe, load_recipe, recipe_folder, recipe_of, recipe_schema
from seprune.recipe.sections import Finetune, Recipe, Section, Train

__all__ = [
    "Finetune",
    "Recipe",
    "Section",
    "Train",
    "dump_recipe",
    "load_recipe",
    "recipe_folder",
    "recipe_of",
    "recipe_schema",
]
