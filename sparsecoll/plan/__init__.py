"""Plans: frozen schedules of transfers, made by pure functions and compared by digest."""

from sparsecoll.plan.algorithms import ALGORITHMS
from sparsecoll.plan.plan import Plan
from sparsecoll.plan.planner import chunk_subset, plan_all_gather, plan_reduce_scatter
from sparsecoll.plan.program import Move, Program, program
from sparsecoll.plan.rounds import Rounds, rounds_of
from sparsecoll.plan.transfer import LEAD, TRANSFER

__all__ = [
    "ALGORITHMS",
    "LEAD",
    "TRANSFER",
    "Move",
    "Plan",
    "Program",
    "Rounds",
    "chunk_subset",
    "plan_all_gather",
    "plan_reduce_scatter",
    "program",
    "rounds_of",
]
