// Work by table, as sparsecoll/cuda/tables.py makes it: blocks take turns at tiles, and places become addresses.
#pragma once

#include "kernels.cuh"

namespace sparsecoll {

struct Tables {
    long long table, num_tiles;
    long long bases[64];
};

// The address of the place that is written at a word of the table.
SPARSECOLL_DEVICE long long place_at(const Tables& a, long long word) {
    return a.bases[load_integer(a.table, word)] + load_integer(a.table, word + 1);
}

}  // namespace sparsecoll
