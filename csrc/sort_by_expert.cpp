#include <algorithm>

#include "kernels.hpp"

namespace sparsecoll {

std::int64_t sort_by_expert(const std::byte* expert_ids, std::int64_t num_assignments, std::int64_t num_experts,
                            std::byte* order, std::byte* counts) {
    constexpr auto item = static_cast<std::int64_t>(sizeof(std::int64_t));
    std::memset(counts, 0, static_cast<std::size_t>(num_experts * item));
    for (std::int64_t i = 0; i < num_assignments; ++i) {
        const std::int64_t expert = load<std::int64_t>(expert_ids, i);
        if (expert < 0 || expert >= num_experts) return i;
        store<std::int64_t>(counts, expert, load<std::int64_t>(counts, expert) + 1);
    }
    // counts serves as the table of next places, so that nothing is allocated, and is turned back into counts by
    // differences: when all are placed, entry e is the end of e, which is the beginning of e + 1.
    std::int64_t begin = 0;
    for (std::int64_t expert = 0; expert < num_experts; ++expert) {
        const std::int64_t count = load<std::int64_t>(counts, expert);
        store<std::int64_t>(counts, expert, begin);
        begin += count;
    }
    for (std::int64_t i = 0; i < num_assignments; ++i) {
        const std::int64_t expert = load<std::int64_t>(expert_ids, i);
        const std::int64_t place = load<std::int64_t>(counts, expert);
        store<std::int64_t>(order, place, i);
        store<std::int64_t>(counts, expert, place + 1);
    }
    for (std::int64_t expert = num_experts - 1; expert > 0; --expert) {
        const std::int64_t end = load<std::int64_t>(counts, expert);
        store<std::int64_t>(counts, expert, end - load<std::int64_t>(counts, expert - 1));
    }
    return -1;
}

}  // namespace sparsecoll
