"""Runs one rank's part of a Plan: over messages in host memory, or in rounds on a stream."""

from sparsecoll.executor.host import Steps, all_gather_steps, reduce_scatter_steps
from sparsecoll.executor.recipe import Recipe, Spot, Spots, gather_recipe, reduce_recipe
from sparsecoll.executor.segments import Segments
from sparsecoll.executor.stream import run_recipe

__all__ = [
    "Recipe",
    "Segments",
    "Spot",
    "Spots",
    "Steps",
    "all_gather_steps",
    "gather_recipe",
    "reduce_recipe",
    "reduce_scatter_steps",
    "run_recipe",
]
