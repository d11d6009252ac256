"""Recipes of training runs, and the changes that one may name on the command line."""

from vllama2_jax.configs.parse import RECIPES, build, parse

__all__ = ["RECIPES", "build", "parse"]
