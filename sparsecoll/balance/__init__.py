"""Balancers: loads → Placement and quotas. Predictors: past loads → those of the next forward. Pure functions."""

from sparsecoll.balance.base import Balance, Balancer
from sparsecoll.balance.costs import Costs, Loads
from sparsecoll.balance.divide import divide_loads
from sparsecoll.balance.eplb import Eplb
from sparsecoll.balance.faster_moe import FasterMoE
from sparsecoll.balance.find import BALANCERS, find_balancer
from sparsecoll.balance.hecate import Hecate
from sparsecoll.balance.least_loaded import LeastLoaded
from sparsecoll.balance.none import NoReplicas
from sparsecoll.balance.predict import DecayingLoad, LastLoad, MeanLoad, Predictor, find_predictor
from sparsecoll.balance.quota import Quota
from sparsecoll.balance.sharding import Sharding, best_sharding, migration_bytes, shard_experts
from sparsecoll.balance.traffic import exposed_s, predicted_s

__all__ = [
    "BALANCERS",
    "Balance",
    "Balancer",
    "Costs",
    "DecayingLoad",
    "Eplb",
    "FasterMoE",
    "Hecate",
    "LastLoad",
    "LeastLoaded",
    "Loads",
    "MeanLoad",
    "NoReplicas",
    "Predictor",
    "Quota",
    "Sharding",
    "best_sharding",
    "divide_loads",
    "exposed_s",
    "find_balancer",
    "find_predictor",
    "migration_bytes",
    "predicted_s",
    "shard_experts",
]
