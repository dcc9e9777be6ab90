"""FSSDP: fully sharded sparse data parallelism for modules with MoE layers."""

from sparsecoll.fssdp.fssdp import FSSDP
from sparsecoll.fssdp.module import FSSDPModule
from sparsecoll.fssdp.reports import LayerLoad, MemoryReport
from sparsecoll.fssdp.step import LayerStep, StepRecord
from sparsecoll.fssdp.step_writer import JsonLinesWriter, StepWriter, TensorBoardWriter

__all__ = [
    "FSSDP",
    "FSSDPModule",
    "JsonLinesWriter",
    "LayerLoad",
    "LayerStep",
    "MemoryReport",
    "StepRecord",
    "StepWriter",
    "TensorBoardWriter",
]
