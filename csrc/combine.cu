// Weighted sums of rows, in the order of k, and their gradients; weights of one where there are none.
#include "kernels.cuh"

namespace sparsecoll {

constexpr int combine_units = 2, combine_rows_together = 2;  // in flight, for each thread
constexpr int backward_units = 2;

// destination[t] = sum over k of weight[t, k] * source[position[t, k]]. Rows are cut into units of Count elements, and
// these into segments of at most combine_units for each thread of a group.
struct Combine {
    long long destination, source, position, weight, num_tokens, top_k, row_units;
    long long segment_units, num_segments, group_bits;
};

template <class T, int Count>
SPARSECOLL_DEVICE void combine_rows(const Combine& a) {
    using Sum = accumulation_t<T>;
    constexpr long long unit_bytes = Count * sizeof(T);
    const long long row_bytes = a.row_units * unit_bytes;
    const long long group = 1ll << a.group_bits;
    const long long num_items = a.num_tokens * a.num_segments;
    const Turn turn = turn_of(a.group_bits);
    for (long long item = turn.first; item < num_items; item += turn.step) {
        const long long token = a.num_segments == 1 ? item : item / a.num_segments;
        const long long begin = (item - token * a.num_segments) * a.segment_units;
        const long long end = least(begin + a.segment_units, a.row_units), first = begin + turn.lane;
        Sum sums[combine_units][Count] = {};
        for (long long k = 0; k < a.top_k; k += combine_rows_together) {
            unsigned long long positions[combine_rows_together];
            T weights[combine_rows_together][1];
#pragma unroll
            for (int j = 0; j < combine_rows_together; ++j) {
                const long long assignment = token * a.top_k + k + j;
                positions[j] = ~0ull;
                load_word(a.position + assignment * 8, positions[j], k + j < a.top_k);
                load_elements(a.weight + assignment * static_cast<long long>(sizeof(T)), weights[j],
                              a.weight != 0 && k + j < a.top_k);
            }
            T rows[combine_rows_together][combine_units][Count];
#pragma unroll
            for (int j = 0; j < combine_rows_together; ++j) {
                const auto position = static_cast<long long>(positions[j]);
                const long long row = a.source + position * row_bytes;
#pragma unroll
                for (int u = 0; u < combine_units; ++u) {
                    const long long unit = first + u * group;
                    load_elements(row + unit * unit_bytes, rows[j][u], position >= 0 && unit < end);
                }
            }
#pragma unroll
            for (int j = 0; j < combine_rows_together; ++j) {
                if (static_cast<long long>(positions[j]) < 0) continue;
                const Sum weight = a.weight ? widen(weights[j][0]) : Sum{1};
#pragma unroll
                for (int u = 0; u < combine_units; ++u) {
#pragma unroll
                    for (int i = 0; i < Count; ++i) sums[u][i] += weight * widen(rows[j][u][i]);
                }
            }
        }
#pragma unroll
        for (int u = 0; u < combine_units; ++u) {
            const long long unit = first + u * group;
            T stored[Count];
#pragma unroll
            for (int i = 0; i < Count; ++i) stored[i] = narrow<T>(sums[u][i]);
            if (unit < end) store_elements(a.destination + token * row_bytes + unit * unit_bytes, stored);
        }
    }
}

// d_source[p] = weight[t, k] * d_destination[t] and d_weight[t, k] = d_destination[t] . source[p], where p is
// position[t, k]. A group of threads has one assignment. Groups larger than a warp need shared memory, 8 bytes for each
// warp of the block.
struct CombineBackward {
    long long d_source, d_weight, d_destination, source, position, weight, num_assignments, top_k, row_units;
    long long group_bits;
};

// The sum over a group, in an order that depends on the group's size only; valid in its first thread.
template <class Sum>
SPARSECOLL_DEVICE Sum sum_of_group(Sum sum, int group) {
    for (int lanes = group < 32 ? group / 2 : 16; lanes > 0; lanes /= 2) {
        sum += __shfl_xor_sync(every_lane, sum, lanes);
    }
    if (group <= 32) return sum;
    Sum* warps = shared_memory<Sum>();
    const int warp = static_cast<int>(threadIdx.x / 32), thread = static_cast<int>(threadIdx.x);
    if (thread % 32 == 0) warps[warp] = sum;
    __syncthreads();
    if (thread % group == 0) {
        for (int other = 1; other < group / 32; ++other) sum += warps[warp + other];
    }
    __syncthreads();
    return sum;
}

template <class T, int Count>
SPARSECOLL_DEVICE void combine_rows_backward(const CombineBackward& a) {
    using Sum = accumulation_t<T>;
    constexpr long long unit_bytes = Count * sizeof(T);
    const long long row_bytes = a.row_units * unit_bytes;
    const int group = 1 << a.group_bits, lane = static_cast<int>(threadIdx.x) & (group - 1);
    const long long groups_in_block = blockDim.x >> a.group_bits;
    // All threads of a block take the same number of turns, as they meet in the reduction.
    for (long long turn = blockIdx.x * groups_in_block; turn < a.num_assignments; turn += gridDim.x * groups_in_block) {
        const long long assignment = turn + (threadIdx.x >> a.group_bits);
        const bool is_one = assignment < a.num_assignments;
        unsigned long long word = ~0ull;
        T weights[1];
        load_word(a.position + assignment * 8, word, is_one);
        load_elements(a.weight + assignment * static_cast<long long>(sizeof(T)), weights, is_one && a.weight != 0);
        const auto position = static_cast<long long>(word);
        const Sum weight = a.weight ? widen(weights[0]) : Sum{1};
        const long long d_row = a.d_destination + assignment / a.top_k * row_bytes;
        const long long row = a.source + position * row_bytes, d_source = a.d_source + position * row_bytes;
        Sum dot = 0;
        for (long long first = lane; position >= 0 && first < a.row_units; first += group * backward_units) {
            T gradients[backward_units][Count], values[backward_units][Count];
#pragma unroll
            for (int u = 0; u < backward_units; ++u) {
                const long long unit = first + u * group;
                load_elements(d_row + unit * unit_bytes, gradients[u], unit < a.row_units);
                load_elements(row + unit * unit_bytes, values[u], unit < a.row_units && a.d_weight != 0);
            }
#pragma unroll
            for (int u = 0; u < backward_units; ++u) {
                const long long unit = first + u * group;
                T stored[Count];
#pragma unroll
                for (int i = 0; i < Count; ++i) {
                    const Sum gradient = widen(gradients[u][i]);
                    stored[i] = narrow<T>(weight * gradient);
                    dot += gradient * widen(values[u][i]);
                }
                if (unit < a.row_units) store_elements(d_source + unit * unit_bytes, stored);
            }
        }
        if (a.d_weight) {
            const T stored[1] = {narrow<T>(sum_of_group(dot, group))};
            if (is_one && lane == 0) {
                store_elements(a.d_weight + assignment * static_cast<long long>(sizeof(T)), stored);
            }
        }
    }
}

SPARSECOLL_KERNEL(combine_float32, Combine, 256, 4, combine_rows<float, 1>)
SPARSECOLL_KERNEL(combine_float64, Combine, 256, 4, combine_rows<double, 1>)
SPARSECOLL_KERNEL(combine_bfloat16, Combine, 256, 4, combine_rows<bfloat16, 1>)
SPARSECOLL_KERNEL(combine_float16, Combine, 256, 4, combine_rows<float16, 1>)
SPARSECOLL_KERNEL(combine_wide_float32, Combine, 256, 4, combine_rows<float, 4>)
SPARSECOLL_KERNEL(combine_wide_float64, Combine, 256, 4, combine_rows<double, 2>)
SPARSECOLL_KERNEL(combine_wide_bfloat16, Combine, 256, 4, combine_rows<bfloat16, 8>)
SPARSECOLL_KERNEL(combine_wide_float16, Combine, 256, 4, combine_rows<float16, 8>)

SPARSECOLL_KERNEL(combine_backward_float32, CombineBackward, 256, 4, combine_rows_backward<float, 1>)
SPARSECOLL_KERNEL(combine_backward_float64, CombineBackward, 256, 4, combine_rows_backward<double, 1>)
SPARSECOLL_KERNEL(combine_backward_bfloat16, CombineBackward, 256, 4, combine_rows_backward<bfloat16, 1>)
SPARSECOLL_KERNEL(combine_backward_float16, CombineBackward, 256, 4, combine_rows_backward<float16, 1>)
SPARSECOLL_KERNEL(combine_backward_wide_float32, CombineBackward, 256, 4, combine_rows_backward<float, 4>)
SPARSECOLL_KERNEL(combine_backward_wide_float64, CombineBackward, 256, 4, combine_rows_backward<double, 2>)
SPARSECOLL_KERNEL(combine_backward_wide_bfloat16, CombineBackward, 256, 4, combine_rows_backward<bfloat16, 8>)
SPARSECOLL_KERNEL(combine_backward_wide_float16, CombineBackward, 256, 4, combine_rows_backward<float16, 8>)

}  // namespace sparsecoll
