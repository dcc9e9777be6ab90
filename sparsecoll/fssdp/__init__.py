"""FSSDP: fully sharded sparse data parallelism for modules with MoE layers."""

from sparsecoll.fssdp.fssdp import FSSDP, FSSDPModule
from sparsecoll.fssdp.reports import LayerLoad, MemoryReport

__all__ = ["FSSDP", "FSSDPModule", "LayerLoad", "MemoryReport"]
