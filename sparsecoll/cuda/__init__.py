"""What runs on NVIDIA GPUs: kernels by address, their tables and their compilation; devices, streams and memory.

CuPy is imported inside functions only, so that this room can be imported everywhere.
"""

from sparsecoll.cuda.device import kernels_for
from sparsecoll.cuda.kernels import Kernels
from sparsecoll.cuda.tables import Place, Span, Sum, Table, pack_table, sum_table

__all__ = ["Kernels", "Place", "Span", "Sum", "Table", "kernels_for", "pack_table", "sum_table"]
