// Stable counting sort of assignments by expert, without a word to the host.
//
// Every warp has a tile, a stretch of assignments, which it walks in order, and a row of counters, one for each expert.
// The rows of all tiles make a table. Walking counts; sums down the columns and over experts turn counts into places;
// walking again places. One block does all of it where tiles are few, four launches otherwise.
#include "kernels.cuh"

namespace sparsecoll {

constexpr int ids_in_flight = 4;  // for each thread; 32 times as many divide the size of a tile

// Tiles have tile_size assignments. The last three are for four launches, where the table and the sum of all counts
// before an expert's lie in memory, and has_shared_rows tells whether a row fits shared memory while its warp walks.
struct SortByExpert {
    long long expert_ids, num_assignments, num_experts, order, counts, ends;
    long long tile_size, num_tiles, table, begins, has_shared_rows;
};

SPARSECOLL_DEVICE unsigned* words_at(long long address) { return reinterpret_cast<unsigned*>(address); }

SPARSECOLL_DEVICE int lane_of_warp() { return static_cast<int>(threadIdx.x % 32); }

// A warp walks a tile: row[e] grows by the assignments of expert e, and is the place of the next one if `places`.
// Assignments to what is no expert are passed over.
template <bool places>
SPARSECOLL_DEVICE void walk_tile(const SortByExpert& a, long long tile, unsigned* row) {
    const long long begin = tile * a.tile_size, end = least(begin + a.tile_size, a.num_assignments);
    const unsigned before_me = (1u << lane_of_warp()) - 1;
    for (long long first = begin; first < end; first += 32 * ids_in_flight) {
        unsigned long long ids[ids_in_flight];
#pragma unroll
        for (int i = 0; i < ids_in_flight; ++i) {
            const long long assignment = first + i * 32 + lane_of_warp();
            ids[i] = ~0ull;
            load_word(a.expert_ids + assignment * 8, ids[i], assignment < end);
        }
#pragma unroll
        for (int i = 0; i < ids_in_flight; ++i) {
            const bool is_expert = ids[i] < static_cast<unsigned long long>(a.num_experts);
            const unsigned expert = is_expert ? static_cast<unsigned>(ids[i]) : ~0u;
            const unsigned alike = __match_any_sync(every_lane, expert);
            const unsigned rank = static_cast<unsigned>(__popc(alike & before_me));
            const unsigned next = is_expert ? row[expert] : 0;
            if (is_expert && places) store_integer(a.order, next + rank, first + i * 32 + lane_of_warp());
            __syncwarp();
            if (is_expert && rank == 0) row[expert] = next + static_cast<unsigned>(__popc(alike));
            __syncwarp();
        }
    }
}

// One block: totals[e] becomes the sum of those before it, and counts and ends are written.
SPARSECOLL_DEVICE void scan_experts(const SortByExpert& a, unsigned* totals, unsigned* warps) {
    const int num_warps = static_cast<int>(blockDim.x / 32), warp = static_cast<int>(threadIdx.x / 32);
    unsigned carried = 0;
    for (long long first = 0; first < a.num_experts; first += blockDim.x) {
        const long long expert = first + threadIdx.x;
        const unsigned total = expert < a.num_experts ? totals[expert] : 0;
        unsigned sum = total;
        for (int lanes = 1; lanes < 32; lanes *= 2) {
            const unsigned other = __shfl_up_sync(every_lane, sum, lanes);
            if (lane_of_warp() >= lanes) sum += other;
        }
        if (lane_of_warp() == 31) warps[warp] = sum;
        __syncthreads();
        unsigned all = carried;
        for (int other = 0; other < num_warps; ++other) {
            if (other == warp) sum += all;
            all += warps[other];
        }
        carried = all;
        if (expert < a.num_experts) {
            totals[expert] = sum - total;
            store_integer(a.counts, expert, total);
            store_word(a.ends + expert * 4, sum);
        }
        __syncthreads();
    }
}

// All in one block, of a warp for each tile. Shared memory has 32 words, a word for each expert, and the table.
SPARSECOLL_DEVICE void sort_in_a_block(const SortByExpert& a) {
    unsigned* warps = shared_memory<unsigned>();
    unsigned* begins = warps + 32;
    unsigned* table = begins + a.num_experts;
    const long long warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
    const auto num_experts = static_cast<unsigned>(a.num_experts), num_words = num_experts * (blockDim.x / 32);
    for (unsigned word = threadIdx.x; word < num_words; word += blockDim.x) table[word] = 0;
    __syncthreads();
    walk_tile<false>(a, warp, table + warp * a.num_experts);
    __syncthreads();
    for (long long expert = threadIdx.x; expert < a.num_experts; expert += blockDim.x) {
        unsigned total = 0;
        for (long long tile = 0; tile < num_warps; ++tile) {
            unsigned& count = table[tile * a.num_experts + expert];
            const unsigned before = total;
            total += count;
            count = before;
        }
        begins[expert] = total;
    }
    __syncthreads();
    scan_experts(a, begins, warps);
    for (unsigned word = threadIdx.x; word < num_words; word += blockDim.x) table[word] += begins[word % num_experts];
    __syncthreads();
    walk_tile<true>(a, warp, table + warp * a.num_experts);
}

// Counts, or places, the tiles of a block's warps.
template <bool places>
SPARSECOLL_DEVICE void sort_walk(const SortByExpert& a) {
    const long long warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
    const unsigned* begins = words_at(a.begins);
    for (long long tile = blockIdx.x * num_warps + warp; tile < a.num_tiles; tile += gridDim.x * num_warps) {
        unsigned* kept = words_at(a.table) + tile * a.num_experts;
        unsigned* row = a.has_shared_rows ? shared_memory<unsigned>() + warp * a.num_experts : kept;
        for (long long expert = lane_of_warp(); expert < a.num_experts; expert += 32) {
            row[expert] = places ? kept[expert] + begins[expert] : 0;
        }
        __syncwarp();
        walk_tile<places>(a, tile, row);
        if (!places && a.has_shared_rows) {
            for (long long expert = lane_of_warp(); expert < a.num_experts; expert += 32) kept[expert] = row[expert];
        }
    }
}

// Counts of a tile become sums of those of the tiles before it, and begins the totals. A warp has 32 experts and a
// stretch of tiles; shared memory has a word for each thread.
SPARSECOLL_DEVICE void sort_sum_tiles(const SortByExpert& a) {
    unsigned* sums = shared_memory<unsigned>();
    const long long warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
    const long long stretch = (a.num_tiles + num_warps - 1) / num_warps;
    const long long begin = least(warp * stretch, a.num_tiles), end = least(begin + stretch, a.num_tiles);
    for (long long first = blockIdx.x * 32ll; first < a.num_experts; first += gridDim.x * 32ll) {
        const long long expert = first + lane_of_warp();
        const bool is_expert = expert < a.num_experts;
        unsigned* column = words_at(a.table) + expert;
        unsigned sum = 0;
        for (long long tile = begin; is_expert && tile < end; ++tile) sum += column[tile * a.num_experts];
        sums[threadIdx.x] = sum;
        __syncthreads();
        unsigned before = 0;
        for (long long other = 0; other < warp; ++other) before += sums[other * 32 + lane_of_warp()];
        if (is_expert && warp == num_warps - 1) words_at(a.begins)[expert] = before + sum;
        for (long long tile = begin; is_expert && tile < end; ++tile) {
            unsigned& count = column[tile * a.num_experts];
            const unsigned after = before + count;
            count = before;
            before = after;
        }
        __syncthreads();
    }
}

SPARSECOLL_DEVICE void sort_sum_experts(const SortByExpert& a) {
    scan_experts(a, words_at(a.begins), shared_memory<unsigned>());
}

SPARSECOLL_KERNEL(sort_small, SortByExpert, 1024, 1, sort_in_a_block)
SPARSECOLL_KERNEL(sort_count, SortByExpert, 256, 4, sort_walk<false>)
SPARSECOLL_KERNEL(sort_tiles, SortByExpert, 1024, 1, sort_sum_tiles)
SPARSECOLL_KERNEL(sort_experts, SortByExpert, 1024, 1, sort_sum_experts)
SPARSECOLL_KERNEL(sort_place, SortByExpert, 256, 4, sort_walk<true>)

}  // namespace sparsecoll
