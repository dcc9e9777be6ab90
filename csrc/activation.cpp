#include <algorithm>
#include <bit>
#include <cmath>

#include "dispatch.hpp"
#include "kernels.hpp"

// [Note: exponentials] A loop with std::exp is not vectorized, and a mathematical library may have other bits on
// another processor. Ours is additions, multiplications and selections, which give the same bits in vectors of any
// width. Arguments are at most 0: nothing overflows, and sigmoids and tails of the normal distribution are small as
// ratios or products, not as differences.

namespace sparsecoll {
namespace {

// Below, e^x is 0, which keeps float32's subnormals away.
constexpr float smallest_exponent = -87.3f;

// A selection that stays one: of floats, ?: may become a branch around a division, and the loop is not vectorized.
SPARSECOLL_INLINE float select(bool condition, float yes, float no) {
    const std::uint32_t mask = 0u - static_cast<std::uint32_t>(condition);
    return std::bit_cast<float>((std::bit_cast<std::uint32_t>(yes) & mask) |
                                (std::bit_cast<std::uint32_t>(no) & ~mask));
}

// e^(x + rest) to about one last place, for x <= 0 and |rest| < 0.03: 2^n * e^r with |r| < 0.38. A rest of -0 (and not
// of 0) costs nothing: compilers know that adding it changes no bit.
SPARSECOLL_INLINE float exp_of(float x, float rest) {
    constexpr float log2_e = 0x1.715476p+0f, magic = 0x1.8p+23f;  // adding it rounds to a whole number, in low bits
    constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;  // the high part times n is exact
    const float shifted = x * log2_e + magic;
    const float n = shifted - magic;
    const float r = ((x - n * ln2_high) - n * ln2_low) + rest;
    // Minimax fit of (e^r - 1 - r) / r^2; relative to e^r it is off by 6e-9.
    float fit = 1.37998827e-3f;
    fit = fit * r + 8.37583840e-3f;
    fit = fit * r + 4.16691490e-2f;
    fit = fit * r + 0.166664556f;
    fit = fit * r + 0.499999881f;
    const float scale = std::bit_cast<float>((std::bit_cast<std::uint32_t>(shifted) << 23) + (127u << 23));
    const float power = (1.0f + (r + r * r * fit)) * scale;
    return select(x < smallest_exponent, 0.0f, power);
}

// sigmoid(x), and 1 - sigmoid(x) without cancellation.
struct Sigmoid {
    float value;
    float complement;
};

SPARSECOLL_INLINE Sigmoid sigmoid(float x) {
    const float small = exp_of(-std::fabs(x), -0.0f);
    const float larger = 1.0f / (1.0f + small);
    const float smaller = small * larger;
    return {select(x < 0.0f, smaller, larger), select(x < 0.0f, larger, smaller)};
}

// Of the standard normal distribution: the probability of values up to x, and its density at x.
struct Normal {
    float probability;
    float density;
};

SPARSECOLL_INLINE Normal normal(float x) {
    constexpr float beyond = 14.0f, center = 4.0f, density_at_0 = 0.398942280f;
    const float magnitude = std::fabs(x);
    const float a = select(magnitude > beyond, beyond, magnitude);
    // The square of 12 bits is exact; what they leave out of a^2 goes into the rest.
    const float high = std::bit_cast<float>(std::bit_cast<std::uint32_t>(a) & 0xfffff000u);
    const float power = exp_of(-0.5f * high * high, -0.5f * (a - high) * (a + high));
    // Minimax fit of the tail beyond a, over e^(-a^2 / 2) / (a + center), in y from -1 on; off by 8e-9.
    const float inverse = 1.0f / (a + center);
    const float y = (a - center) * inverse;
    float fit = -0.000125690051f;
    fit = fit * y + 0.000193158262f;
    fit = fit * y + 0.00157546075f;
    fit = fit * y - 0.00351847539f;
    fit = fit * y - 0.00752912592f;
    fit = fit * y + 0.0604045057f;
    fit = fit * y - 0.186522842f;
    fit = fit * y + 0.387136883f;
    fit = fit * y - 0.60789661f;
    fit = fit * y + 0.755285135f;
    const float tail = power * inverse * fit;
    return {select(x < 0.0f, tail, 1.0f - tail), power * density_at_0};
}

template <class T>
SPARSECOLL_INLINE void swiglu_range(std::byte* destination, const std::byte* source, std::int64_t dim,
                                    std::int64_t begin, std::int64_t end) {
    const std::int64_t row_bytes = dim * static_cast<std::int64_t>(sizeof(T));
    for (std::int64_t row = begin; row < end; ++row) {
        const std::byte *gates = source + 2 * row * row_bytes, *ups = gates + row_bytes;
        std::byte* out = destination + row * row_bytes;
#pragma GCC ivdep
        for (std::int64_t i = 0; i < dim; ++i) {
            const float gate = load<T>(gates, i);
            store<T>(out, i, gate * sigmoid(gate).value * load<T>(ups, i));
        }
    }
}

// activated may be d_activated: every element is read before it is written, which is all that ivdep claims.
template <class T>
SPARSECOLL_INLINE void swiglu_backward_range(std::byte* d_source, std::byte* activated, const std::byte* d_activated,
                                             const std::byte* source, std::int64_t dim, std::int64_t begin,
                                             std::int64_t end) {
    const std::int64_t row_bytes = dim * static_cast<std::int64_t>(sizeof(T));
    for (std::int64_t row = begin; row < end; ++row) {
        const std::byte *gates = source + 2 * row * row_bytes, *ups = gates + row_bytes;
        std::byte *d_gates = d_source + 2 * row * row_bytes, *d_ups = d_gates + row_bytes;
        const std::byte* d_out = d_activated + row * row_bytes;
        std::byte* out = activated + row * row_bytes;
#pragma GCC ivdep
        for (std::int64_t i = 0; i < dim; ++i) {
            const float gate = load<T>(gates, i), up = load<T>(ups, i), d = load<T>(d_out, i);
            const Sigmoid chance = sigmoid(gate);
            const float silu = gate * chance.value;
            store<T>(d_gates, i, d * up * (chance.value * (1.0f + gate * chance.complement)));
            store<T>(d_ups, i, d * silu);
            store<T>(out, i, silu * up);
        }
    }
}

template <class T>
SPARSECOLL_INLINE void gelu_backward_range(std::byte* d_source, std::byte* activated, const std::byte* d_activated,
                                           const std::byte* source, std::int64_t begin, std::int64_t end) {
#pragma GCC ivdep
    for (std::int64_t i = begin; i < end; ++i) {
        const float x = load<T>(source, i), d = load<T>(d_activated, i);
        const Normal chance = normal(x);
        store<T>(d_source, i, d * (chance.probability + x * chance.density));
        store<T>(activated, i, x * chance.probability);
    }
}

// Elements below which another thread is not worth its start.
constexpr std::int64_t elements_per_part = 1 << 13;

std::int64_t rows_per_part(std::int64_t dim) {
    return std::max<std::int64_t>(1, elements_per_part / std::max<std::int64_t>(1, dim));
}

}  // namespace

#define SPARSECOLL_ACTIVATION(name, type)                                                                            \
    SPARSECOLL_CLONES void swiglu_##name(std::byte* destination, const std::byte* source, std::int64_t dim,          \
                                         std::int64_t begin, std::int64_t end) {                                     \
        swiglu_range<type>(destination, source, dim, begin, end);                                                    \
    }                                                                                                                \
    SPARSECOLL_CLONES void swiglu_backward_##name(std::byte* d_source, std::byte* activated,                         \
                                                  const std::byte* d_activated, const std::byte* source,             \
                                                  std::int64_t dim, std::int64_t begin, std::int64_t end) {          \
        swiglu_backward_range<type>(d_source, activated, d_activated, source, dim, begin, end);                      \
    }                                                                                                                \
    SPARSECOLL_CLONES void gelu_backward_##name(std::byte* d_source, std::byte* activated,                           \
                                                const std::byte* d_activated, const std::byte* source,               \
                                                std::int64_t begin, std::int64_t end) {                              \
        gelu_backward_range<type>(d_source, activated, d_activated, source, begin, end);                             \
    }
SPARSECOLL_ACTIVATION(float32, float)
SPARSECOLL_ACTIVATION(bfloat16, bfloat16)
SPARSECOLL_ACTIVATION(float16, float16)

void swiglu(std::byte* destination, const std::byte* source, std::int64_t num_rows, std::int64_t dim, DType dtype,
            int num_threads) {
    const auto run = [&](auto forward) {
        for_each_part(num_rows, rows_per_part(dim), num_threads,
                      [&](std::int64_t begin, std::int64_t end) { forward(destination, source, dim, begin, end); });
    };
    switch (dtype) {
        case DType::float32: return run(swiglu_float32);
        case DType::bfloat16: return run(swiglu_bfloat16);
        case DType::float16: return run(swiglu_float16);
        default: return;
    }
}

void swiglu_backward(std::byte* d_source, std::byte* activated, const std::byte* d_activated, const std::byte* source,
                     std::int64_t num_rows, std::int64_t dim, DType dtype, int num_threads) {
    const auto run = [&](auto backward) {
        for_each_part(num_rows, rows_per_part(dim), num_threads, [&](std::int64_t begin, std::int64_t end) {
            backward(d_source, activated, d_activated, source, dim, begin, end);
        });
    };
    switch (dtype) {
        case DType::float32: return run(swiglu_backward_float32);
        case DType::bfloat16: return run(swiglu_backward_bfloat16);
        case DType::float16: return run(swiglu_backward_float16);
        default: return;
    }
}

void gelu_backward(std::byte* d_source, std::byte* activated, const std::byte* d_activated, const std::byte* source,
                   std::int64_t num_elements, DType dtype, int num_threads) {
    const auto run = [&](auto backward) {
        for_each_part(num_elements, elements_per_part, num_threads, [&](std::int64_t begin, std::int64_t end) {
            backward(d_source, activated, d_activated, source, begin, end);
        });
    };
    switch (dtype) {
        case DType::float32: return run(gelu_backward_float32);
        case DType::bfloat16: return run(gelu_backward_bfloat16);
        case DType::float16: return run(gelu_backward_float16);
        default: return;
    }
}

}  // namespace sparsecoll
