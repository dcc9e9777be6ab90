"""Your own module with a mixture of experts in it, trained on all ranks with FSSDP.

python examples/wrap_your_model.py                            # one rank
mpirun -n 2 python examples/wrap_your_model.py                # MPI
torchrun --nproc-per-node 2 examples/wrap_your_model.py       # Gloo
"""

import torch
from torch import nn

import sparsecoll as sc
from sparsecoll.moe import MoELayer

DIM, NUM_KINDS, NUM_STEPS = 16, 6, 100


class YourModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(DIM, 32)
        self.moe = MoELayer(32, hidden_dim=64, num_experts=8, top_k=2)
        self.outlet = nn.Linear(32, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.inlet(x))
        return self.outlet(h + self.moe(h))


def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of several kinds, the first of which is the most frequent; each kind is turned in its own way."""
    task = torch.Generator().manual_seed(0)
    centers = 2 * torch.randn(NUM_KINDS, DIM, generator=task)
    turns = torch.randn(NUM_KINDS, DIM, DIM, generator=task) / DIM**0.5
    kinds = torch.multinomial(2.0 ** -torch.arange(NUM_KINDS), 256, replacement=True, generator=generator)
    x = centers[kinds] + torch.randn(256, DIM, generator=generator)
    return x, (turns[kinds] @ x.unsqueeze(-1)).squeeze(-1)


with sc.init_group() as group:
    model = sc.FSSDP(YourModel())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(group.rank)  # every rank has data of its own
    for step in range(1, NUM_STEPS + 1):
        x, y = batch(generator)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        model.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean_loss = group.mean(loss.item())
        if group.rank == 0 and (step == 1 or step % 20 == 0):
            print(f"step {step:3}: loss {mean_loss:.3f}")
    load, memory = model.load_report()["moe"], model.memory_report(optimizer)
    if group.rank == 0:
        print(f"tokens of each expert: {load.tokens}; copied to all ranks: {list(load.hot)}")
        print(f"busiest rank over mean: {load.imbalance_after:.2f} (without copies: {load.imbalance_before:.2f})")
        print(f"bytes on rank 0: parameters {memory.param_bytes}, optimizer {memory.optimizer_bytes}")
