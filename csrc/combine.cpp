#include <algorithm>

#include "dispatch.hpp"
#include "kernels.hpp"

namespace sparsecoll {
namespace {

// Elements of a token combined at a time: their sums stay in the first-level cache.
constexpr std::int64_t block_size = 1024;
// Partial sums of a dot product. Their number is fixed, so that the result depends on no vector width.
constexpr std::int64_t num_lanes = 64;

template <class T>
SPARSECOLL_INLINE accumulation_t<T> weight_of(const Routing& routing, std::int64_t assignment) {
    return routing.weight ? load<T>(routing.weight, assignment) : accumulation_t<T>{1};
}

template <class T>
SPARSECOLL_INLINE void combine_range(std::byte* destination, const std::byte* source, const Routing& routing,
                                     std::int64_t begin, std::int64_t end) {
    using Sum = accumulation_t<T>;
    const std::int64_t row_bytes = routing.dim * static_cast<std::int64_t>(sizeof(T));
    alignas(64) Sum sums[block_size];
    for (std::int64_t token = begin; token < end; ++token) {
        for (std::int64_t first = 0; first < routing.dim; first += block_size) {
            const std::int64_t count = std::min(block_size, routing.dim - first);
            const std::int64_t offset = first * static_cast<std::int64_t>(sizeof(T));
            std::fill_n(sums, count, Sum{0});
            for (std::int64_t k = 0; k < routing.top_k; ++k) {
                const std::int64_t assignment = token * routing.top_k + k;
                const std::int64_t position = load<std::int64_t>(routing.position, assignment);
                if (position < 0) continue;
                const Sum weight = weight_of<T>(routing, assignment);
                const std::byte* row = source + position * row_bytes + offset;
                for (std::int64_t i = 0; i < count; ++i) sums[i] += weight * load<T>(row, i);
            }
            std::byte* row = destination + token * row_bytes + offset;
            for (std::int64_t i = 0; i < count; ++i) store<T>(row, i, sums[i]);
        }
    }
}

template <class T>
SPARSECOLL_INLINE void scale(std::byte* __restrict destination, const std::byte* __restrict row,
                             accumulation_t<T> weight, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) store<T>(destination, i, weight * load<T>(row, i));
}

template <class T>
SPARSECOLL_INLINE accumulation_t<T> dot(const std::byte* a, const std::byte* b, std::int64_t count) {
    alignas(64) accumulation_t<T> lanes[num_lanes] = {};
    std::int64_t first = 0;
    for (; first + num_lanes <= count; first += num_lanes) {
        for (std::int64_t lane = 0; lane < num_lanes; ++lane) {
            lanes[lane] += load<T>(a, first + lane) * load<T>(b, first + lane);
        }
    }
    for (std::int64_t lane = 0; first + lane < count; ++lane) {
        lanes[lane] += load<T>(a, first + lane) * load<T>(b, first + lane);
    }
    for (std::int64_t half = num_lanes / 2; half > 0; half /= 2) {
        for (std::int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
}

template <class T>
SPARSECOLL_INLINE void combine_backward_range(std::byte* d_source, std::byte* d_weight,
                                              const std::byte* d_destination, const std::byte* source,
                                              const Routing& routing, std::int64_t begin, std::int64_t end) {
    const std::int64_t row_bytes = routing.dim * static_cast<std::int64_t>(sizeof(T));
    for (std::int64_t token = begin; token < end; ++token) {
        const std::byte* d_row = d_destination + token * row_bytes;
        for (std::int64_t k = 0; k < routing.top_k; ++k) {
            const std::int64_t assignment = token * routing.top_k + k;
            const std::int64_t position = load<std::int64_t>(routing.position, assignment);
            if (position >= 0) {
                scale<T>(d_source + position * row_bytes, d_row, weight_of<T>(routing, assignment), routing.dim);
            }
            if (d_weight) {
                store<T>(d_weight, assignment,
                         position < 0 ? 0 : dot<T>(d_row, source + position * row_bytes, routing.dim));
            }
        }
    }
}

// Tokens below which another thread is not worth its start.
std::int64_t tokens_per_part(const Routing& routing) {
    return std::max<std::int64_t>(1, (1 << 13) / std::max<std::int64_t>(1, routing.dim * routing.top_k));
}

}  // namespace

#define SPARSECOLL_COMBINE(name, type)                                                                            \
    SPARSECOLL_CLONES void combine_##name(std::byte* destination, const std::byte* source, const Routing& routing, \
                                          std::int64_t begin, std::int64_t end) {                                 \
        combine_range<type>(destination, source, routing, begin, end);                                            \
    }                                                                                                             \
    SPARSECOLL_CLONES void combine_backward_##name(std::byte* d_source, std::byte* d_weight,                      \
                                                   const std::byte* d_destination, const std::byte* source,       \
                                                   const Routing& routing, std::int64_t begin, std::int64_t end) { \
        combine_backward_range<type>(d_source, d_weight, d_destination, source, routing, begin, end);             \
    }
SPARSECOLL_COMBINE(float32, float)
SPARSECOLL_COMBINE(float64, double)
SPARSECOLL_COMBINE(bfloat16, bfloat16)
SPARSECOLL_COMBINE(float16, float16)

void combine(std::byte* destination, const std::byte* source, const Routing& routing, DType dtype, int num_threads) {
    for_each_part(routing.num_tokens, tokens_per_part(routing), num_threads, [&](std::int64_t begin, std::int64_t end) {
        switch (dtype) {
            case DType::float32: return combine_float32(destination, source, routing, begin, end);
            case DType::float64: return combine_float64(destination, source, routing, begin, end);
            case DType::bfloat16: return combine_bfloat16(destination, source, routing, begin, end);
            case DType::float16: return combine_float16(destination, source, routing, begin, end);
            default: return;
        }
    });
}

void combine_backward(std::byte* d_source, std::byte* d_weight, const std::byte* d_destination,
                      const std::byte* source, const Routing& routing, DType dtype, int num_threads) {
    const auto run = [&](auto backward) {
        for_each_part(routing.num_tokens, tokens_per_part(routing), num_threads,
                      [&](std::int64_t begin, std::int64_t end) {
                          backward(d_source, d_weight, d_destination, source, routing, begin, end);
                      });
    };
    switch (dtype) {
        case DType::float32: return run(combine_backward_float32);
        case DType::float64: return run(combine_backward_float64);
        case DType::bfloat16: return run(combine_backward_bfloat16);
        case DType::float16: return run(combine_backward_float16);
        default: return;
    }
}

}  // namespace sparsecoll
