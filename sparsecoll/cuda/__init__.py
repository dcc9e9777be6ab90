"""What runs on NVIDIA GPUs: kernels by address, their tables and their compilation; devices, streams and memory.

CuPy is imported inside functions only, so that this room can be imported everywhere.
"""

from sparsecoll.cuda.device import kernels_for

__all__ = ["kernels_for"]
