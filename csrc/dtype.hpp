// Element types, the types in which they are summed, and conversions that compilers vectorize.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define SPARSECOLL_INLINE [[gnu::always_inline]] inline

namespace sparsecoll {

enum class DType { float32, float64, bfloat16, float16, int8, int16, int32, int64, uint8 };

struct bfloat16 {
    std::uint16_t bits;
};

struct float16 {
    std::uint16_t bits;
};

// Sums of 16-bit floats are kept in float32; every other type is its own accumulation type. Integers are
// handled as unsigned, whose overflow wraps by definition.
template <class T>
using accumulation_t =
    std::conditional_t<std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>, float, T>;

SPARSECOLL_INLINE float widen(bfloat16 value) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

// [Note: half floats by integers] A half's exponent is re-biased by adding 112 to float32's exponent field, and
// once more for Inf and NaN. Subnormals ride on the exponent of 2^-14 and lose that offset in one exact
// subtraction. All branches are computed and selected, so that loops vectorize on any x86-64, and no float32
// subnormal ever appears, so that results do not depend on flush-to-zero.
SPARSECOLL_INLINE float widen(float16 value) {
    constexpr std::uint32_t rebias = 112u << 23, smallest_normal = 113u << 23;
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    const std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13;
    const std::uint32_t normal = magnitude + rebias + (magnitude >= 0x7c00u << 13 ? rebias : 0u);
    const std::uint32_t subnormal =
        std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude + smallest_normal) -
                                     std::bit_cast<float>(smallest_normal));
    return std::bit_cast<float>(sign | (magnitude < 0x0400u << 13 ? subnormal : normal));
}

template <class T>
SPARSECOLL_INLINE T widen(T value) {
    return value;
}

template <class T>
SPARSECOLL_INLINE T narrow(accumulation_t<T> value) {
    return value;
}

// Both roundings are to nearest, ties to even; a NaN stays a (quiet) NaN.
template <>
SPARSECOLL_INLINE bfloat16 narrow<bfloat16>(float value) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t nan = (bits >> 16) | 0x40u;
    return {static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

template <>
SPARSECOLL_INLINE float16 narrow<float16>(float value) {
    constexpr std::uint32_t rebias = 112u << 23, smallest_normal = 113u << 23, infinity = 0x7c00u;
    constexpr std::uint32_t half = 126u << 23;  // 0.5f, whose last place is a half's smallest subnormal
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = (bits & 0x80000000u) >> 16;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    const std::uint32_t rounded = (magnitude - rebias + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Selections by & and | of comparison masks would read worse; these ?: compile to blends.
    const std::uint32_t normal = magnitude >= 0x477ff000u ? infinity : rounded;  // 65520 and up round to Inf
    const std::uint32_t subnormal =
        std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + std::bit_cast<float>(half)) - half;
    const std::uint32_t nan = infinity | 0x200u | ((magnitude >> 13) & 0x3ffu);
    const std::uint32_t number = magnitude < smallest_normal ? subnormal : normal;
    return {static_cast<std::uint16_t>(sign | (magnitude > 0x7f800000u ? nan : number))};
}

// Addresses come from anywhere, aligned or not: memcpy of one element is one (vectorizable) move.
template <class T>
SPARSECOLL_INLINE accumulation_t<T> load(const std::byte* row, std::int64_t i) {
    T value;
    std::memcpy(&value, row + i * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
    return widen(value);
}

template <class T>
SPARSECOLL_INLINE void store(std::byte* row, std::int64_t i, accumulation_t<T> sum) {
    const T value = narrow<T>(sum);
    std::memcpy(row + i * static_cast<std::int64_t>(sizeof(T)), &value, sizeof(T));
}

}  // namespace sparsecoll
