"""The public collectives."""

from sparsecoll.collectives.all_to_all import all_to_all
from sparsecoll.collectives.sparse import sparse_all_gather, sparse_reduce_scatter

__all__ = ["all_to_all", "sparse_all_gather", "sparse_reduce_scatter"]
