// Who holds the chunks that have to move.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "plan.hpp"

namespace sparsecoll::plan {

// Chunks with more holders than the owner, ascending; each is an item.
struct Holdings {
    std::vector<std::int64_t> chunks;
    std::vector<std::int32_t> ranks;  // of all items, ascending within each
    std::vector<std::size_t> begins;  // where the ranks of an item begin, and where all end
    std::size_t most = 0;             // holders of one item

    explicit Holdings(const Case& given);

    std::size_t size() const { return chunks.size(); }
    std::span<const std::int32_t> of(std::size_t item) const {
        return std::span(ranks).subspan(begins[item], begins[item + 1] - begins[item]);
    }
};

}  // namespace sparsecoll::plan
