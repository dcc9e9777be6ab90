"""Plans: frozen schedules of transfers, made by pure functions and compared by digest."""

from sparsecoll.plan.plan import TRANSFER, Plan
from sparsecoll.plan.planner import chunk_subset, plan_all_gather, plan_reduce_scatter
from sparsecoll.plan.program import Move, Program, Stage, program

__all__ = [
    "TRANSFER",
    "Move",
    "Plan",
    "Program",
    "Stage",
    "chunk_subset",
    "plan_all_gather",
    "plan_reduce_scatter",
    "program",
]
