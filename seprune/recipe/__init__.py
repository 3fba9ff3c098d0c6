"""Recipes: one YAML file says everything a run does. Torch-free, so that mistakes show at once."""

from seprune.recipe.load import (
    command_recipe,
    dump_recipe,
    load_recipe,
    recipe_folder,
    recipe_of,
    recipe_schema,
)
from seprune.recipe.sections import CommandRecipe, Recipe, Section

__all__ = [
    "CommandRecipe",
    "Recipe",
    "Section",
    "command_recipe",
    "dump_recipe",
    "load_recipe",
    "recipe_folder",
    "recipe_of",
    "recipe_schema",
]
