"""One chunk of more than 2^31 bytes: offsets do not wrap, and it travels in parts."""

from __future__ import annotations

import os

import numpy as np
import pytest

import sparsecoll as sc

_BYTES = 2_200_000_000
_NEEDED = 4 * _BYTES


@pytest.mark.skipif(
    os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") < _NEEDED, reason="needs 9 GB of free memory"
)
def test_a_chunk_past_two_gigabytes_arrives_whole() -> None:
    place = sc.Placement.of_owners([0], 2).replicate({0: [1]})

    def main(group: sc.Group) -> None:
        shard = np.zeros((1 - group.rank, _BYTES), np.uint8)
        marks = [0, 2**30 - 1, 2**30, 2**31 - 1, 2**31, _BYTES - 1]
        if group.rank == 0:
            shard[0, marks] = range(1, 7)
        held = sc.sparse_all_gather(shard, place, group=group, timeout_s=50)
        assert held[0, marks].tolist() == [1, 2, 3, 4, 5, 6]
        assert np.count_nonzero(held) == 6
        stats = group.stats()
        assert stats.sent_bytes + stats.received_bytes == _BYTES
        assert stats.sent_messages + stats.received_messages == 3

    sc.run_local(main, 2, timeout_s=55)
