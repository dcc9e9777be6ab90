#include <algorithm>

#include "dispatch.hpp"
#include "kernels.hpp"

namespace sparsecoll {
namespace {

struct Task {
    std::byte* destination;
    bool destination_is_partial;
    const Row* sources;
    std::int64_t num_sources;
    std::int64_t divisor;
};

// Elements summed at a time: their accumulators stay in the first-level cache, and memory is passed over once.
constexpr std::int64_t block_size = 1024;

// target[i] = ((sums[i] + rows[0][i]) + rows[1][i]) + ..., or without sums if Begins. target may be sums, or equal one
// of the rows: every element is read before it is written, which is all that ivdep claims.
template <class Stored, int Count, bool Begins, class Sum>
SPARSECOLL_INLINE void add_rows(std::byte* target, const Sum* sums, const std::byte* const* rows, std::int64_t size) {
    const std::byte* row[Count];
    std::copy_n(rows, Count, row);
#pragma GCC ivdep
    for (std::int64_t i = 0; i < size; ++i) {
        Sum sum = load<Stored>(row[0], i);
        if constexpr (!Begins) sum = static_cast<Sum>(sums[i] + sum);
        for (int r = 1; r < Count; ++r) sum = static_cast<Sum>(sum + load<Stored>(row[r], i));
        store<Sum>(target, i, sum);
    }
}

template <class Stored, bool Begins, class Sum>
SPARSECOLL_INLINE void add_group(std::byte* target, const Sum* sums, const std::byte* const* rows, int num_rows,
                                 std::int64_t size) {
    switch (num_rows) {
        case 1: return add_rows<Stored, 1, Begins>(target, sums, rows, size);
        case 2: return add_rows<Stored, 2, Begins>(target, sums, rows, size);
        case 3: return add_rows<Stored, 3, Begins>(target, sums, rows, size);
        default: return add_rows<Stored, 4, Begins>(target, sums, rows, size);
    }
}

// Sums block by block, and in a block group by group: up to four consecutive sources of one kind are added in
// registers, and what came before them waits in `sums`. The last group writes to the destination at once if no
// conversion or division is left to do.
template <class T>
SPARSECOLL_INLINE void sum_range(const Task& task, std::int64_t begin, std::int64_t end) {
    using Sum = accumulation_t<T>;
    constexpr int group_size = 4;
    constexpr bool is_float = std::is_floating_point_v<Sum>;
    alignas(64) Sum sums[block_size];
    const auto bytes = [](bool is_partial) { return static_cast<std::int64_t>(is_partial ? sizeof(Sum) : sizeof(T)); };
    const bool divides = is_float && task.divisor != 1;
    const bool converts = !task.destination_is_partial && !std::is_same_v<T, Sum>;
    for (std::int64_t first = begin; first < end; first += block_size) {
        const std::int64_t size = std::min(block_size, end - first);
        std::byte* destination = task.destination + first * bytes(task.destination_is_partial);
        for (std::int64_t s = 0; s < task.num_sources;) {
            const bool begins = s == 0, is_partial = task.sources[s].is_partial;
            const std::byte* rows[group_size];
            int num_rows = 0;
            while (num_rows < group_size && s < task.num_sources && task.sources[s].is_partial == is_partial) {
                rows[num_rows++] = task.sources[s++].address + first * bytes(is_partial);
            }
            const bool is_last = s == task.num_sources;
            std::byte* target =
                is_last && !divides && !converts ? destination : reinterpret_cast<std::byte*>(sums);
            if (is_partial) {
                begins ? add_group<Sum, true>(target, sums, rows, num_rows, size)
                       : add_group<Sum, false>(target, sums, rows, num_rows, size);
            } else {
                begins ? add_group<T, true>(target, sums, rows, num_rows, size)
                       : add_group<T, false>(target, sums, rows, num_rows, size);
            }
        }
        if constexpr (is_float) {
            if (divides) {
                const auto divisor = static_cast<Sum>(task.divisor);
                for (std::int64_t i = 0; i < size; ++i) sums[i] /= divisor;
            }
            if (converts) {
                for (std::int64_t i = 0; i < size; ++i) store<T>(destination, i, sums[i]);
            } else if (divides) {
                std::memcpy(destination, sums, static_cast<std::size_t>(size) * sizeof(Sum));
            }
        }
    }
}

}  // namespace

#define SPARSECOLL_SUM(name, type)                                                            \
    SPARSECOLL_CLONES void sum_##name(const Task& task, std::int64_t begin, std::int64_t end) { \
        sum_range<type>(task, begin, end);                                                    \
    }
SPARSECOLL_SUM(float32, float)
SPARSECOLL_SUM(float64, double)
SPARSECOLL_SUM(bfloat16, bfloat16)
SPARSECOLL_SUM(float16, float16)
SPARSECOLL_SUM(bits8, std::uint8_t)
SPARSECOLL_SUM(bits16, std::uint16_t)
SPARSECOLL_SUM(bits32, std::uint32_t)
SPARSECOLL_SUM(bits64, std::uint64_t)

void sum_rows(std::byte* destination, bool destination_is_partial, const Row* sources, std::int64_t num_sources,
              std::int64_t num_elements, DType dtype, std::int64_t divisor, int num_threads) {
    const Task task{destination, destination_is_partial, sources, num_sources, divisor};
    for_each_part(num_elements, block_size, num_threads, [&](std::int64_t begin, std::int64_t end) {
        switch (dtype) {
            case DType::float32: return sum_float32(task, begin, end);
            case DType::float64: return sum_float64(task, begin, end);
            case DType::bfloat16: return sum_bfloat16(task, begin, end);
            case DType::float16: return sum_float16(task, begin, end);
            case DType::int8:
            case DType::uint8: return sum_bits8(task, begin, end);
            case DType::int16: return sum_bits16(task, begin, end);
            case DType::int32: return sum_bits32(task, begin, end);
            case DType::int64: return sum_bits64(task, begin, end);
        }
    });
}

}  // namespace sparsecoll
