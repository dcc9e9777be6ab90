// What the native core can do. Addresses need no alignment; sizes are int64; nothing here throws or allocates.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.hpp"

namespace sparsecoll {

// A row of elements, in a dtype or ("partial") in its accumulation type.
struct Row {
    const std::byte* address;
    bool is_partial;
};

// destination[i] = (sources[0][i] + sources[1][i] + ...) / divisor, in that order, in the accumulation type.
// destination may be one of the sources if their element sizes agree. Integers ignore divisor.
void sum_rows(std::byte* destination, bool destination_is_partial, const Row* sources, std::int64_t num_sources,
              std::int64_t num_elements, DType dtype, std::int64_t divisor, int num_threads);

// Stable counting sort: order[j] = index of the j-th assignment in expert order, counts[e] = assignments of e.
// Returns the index of the first id outside 0..num_experts-1 (order and counts are garbage then), or -1.
std::int64_t sort_by_expert(const std::byte* expert_ids, std::int64_t num_assignments, std::int64_t num_experts,
                            std::byte* order, std::byte* counts);

// destination[i] = source[index[i]], rows of row_bytes; zeros where index[i] is negative.
void permute_rows(std::byte* destination, const std::byte* source, const std::byte* index, std::int64_t num_rows,
                  std::int64_t row_bytes, int num_threads);

// The tokens' side of combine and of its backward; dtype is a float type.
// position [num_tokens, top_k] int64, negative for none; weight [num_tokens, top_k] in dtype, null for ones.
struct Routing {
    const std::byte* position;
    const std::byte* weight;
    std::int64_t num_tokens;
    std::int64_t top_k;
    std::int64_t dim;
};

// destination[t] = sum over k, in order, of weight[t, k] * source[position[t, k]].
void combine(std::byte* destination, const std::byte* source, const Routing& routing, DType dtype, int num_threads);

// d_source[position[t, k]] = weight[t, k] * d_destination[t];
// d_weight[t, k] = d_destination[t] . source[position[t, k]] (0 where there is none).
// Each position occurs once; d_weight may be null, and source too then. No two ranges overlap.
void combine_backward(std::byte* d_source, std::byte* d_weight, const std::byte* d_destination,
                      const std::byte* source, const Routing& routing, DType dtype, int num_threads);

// What lies between an expert's two matrices; dtype is float32, bfloat16 or float16, arithmetic is in float32.

// destination[n] = silu(gate) * up [dim], where source[n] is a gate and an up [2, dim]. They lie apart.
void swiglu(std::byte* destination, const std::byte* source, std::int64_t num_rows, std::int64_t dim, DType dtype,
            int num_threads);

// The gradient d_source of source, and swiglu's result again. activated may be d_activated; no others overlap.
void swiglu_backward(std::byte* d_source, std::byte* activated, const std::byte* d_activated, const std::byte* source,
                     std::int64_t num_rows, std::int64_t dim, DType dtype, int num_threads);

// The same for the exact gelu, element by element.
void gelu_backward(std::byte* d_source, std::byte* activated, const std::byte* d_activated, const std::byte* source,
                   std::int64_t num_elements, DType dtype, int num_threads);

}  // namespace sparsecoll
