#include "dispatch.hpp"
#include "kernels.hpp"

namespace sparsecoll {

void permute_rows(std::byte* destination, const std::byte* source, const std::byte* index, std::int64_t num_rows,
                  std::int64_t row_bytes, int num_threads) {
    constexpr std::int64_t part_bytes = 1 << 14;  // less is not worth a thread
    const std::int64_t grain = std::max<std::int64_t>(1, part_bytes / std::max<std::int64_t>(1, row_bytes));
    for_each_part(num_rows, grain, num_threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const auto row = load<std::int64_t>(index, i);
            if (row < 0) {
                std::memset(destination + i * row_bytes, 0, static_cast<std::size_t>(row_bytes));
            } else {
                std::memcpy(destination + i * row_bytes, source + row * row_bytes,
                            static_cast<std::size_t>(row_bytes));
            }
        }
    });
}

}  // namespace sparsecoll
