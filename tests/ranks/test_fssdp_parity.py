"""The gradient rule: losses, gradients, norms and steps of a wrapped model are those of one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sparsecoll as sc
from sparsecoll.balance import Busiest, NoReplicas
from tests.fssdp_checks import Case, Run, Script, accumulate, check_script, train

WORLD_SIZES = [1, 2, 3, 4, 7]

CASES = {
    "uneven experts, or fewer than ranks": Case(),
    "no replicas": Case(balancer=NoReplicas()),
    "all experts everywhere": Case(balancer=Busiest(most=5, min_gain=0, window=1)),
    "adamw, aux loss": Case(optimizer="adamw", aux_loss_coef=0.3),
    "gelu, shared expert": Case(activation="gelu", shared_hidden_dim=3, top_k=1),
    "swiglu, shared expert, aux loss": Case(shared_hidden_dim=5, aux_loss_coef=1.0, top_k=3, optimizer="adamw"),
    "first rank without tokens": Case(tokens=(0, 5, 3), aux_loss_coef=0.1),
    "last rank without tokens, no replicas": Case(tokens=(6, 5, 4, 3, 2, 1, 0), balancer=NoReplicas()),
    "expert that nobody chose": Case(biases=((0, -50.0), (4, -50.0))),
    "all tokens to one expert": Case(top_k=1, biases=((2, 50.0),)),
    "all tokens to one expert, no replicas": Case(top_k=1, biases=((4, 50.0),), balancer=NoReplicas()),
    "one expert": Case(num_experts=1, top_k=1, biases=()),
    "many experts": Case(num_experts=19, top_k=4, optimizer="adamw", tokens=(30, 1, 12)),
}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", CASES)
def test_training_equals_one_process(name: str, world_size: int) -> None:
    sc.run_local(lambda group: check_script(group, CASES[name]) and None, world_size)
