// Work divided among those who may do it; sparsecoll/plan/division.py says how and why.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "plan.hpp"

namespace sparsecoll::plan {

constexpr std::int32_t nobody = -1;

// Spans have an entry for each item; home may be empty, or nobody.
struct Work {
    std::span<const Amount> amounts;
    std::span<const std::span<const std::int32_t>> allowed;  // ascending bins
    std::span<const std::int32_t> home;
};

// Spans have an entry for each bin, pool_cost for each pool; both spans of pools may be empty.
struct Bins {
    std::span<const Amount> base;
    std::span<const std::int64_t> cost;
    std::span<const std::int32_t> pool_of;
    std::span<const std::int64_t> pool_cost;
};

struct Share {
    std::int32_t bin;
    Amount amount;
};

struct Division {
    Ticks level;
    std::vector<Share> shares;        // of all items, each item's bins ascending
    std::vector<std::size_t> begins;  // where the shares of an item begin, and where all end

    std::span<const Share> of(std::size_t item) const {
        return std::span(shares).subspan(begins[item], begins[item + 1] - begins[item]);
    }
};

Division divide(const Work& work, const Bins& bins, Ticks floor);

}  // namespace sparsecoll::plan
