// When every piece of a table arrives; sparsecoll/plan/simulate.py says what is played.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "plan.hpp"

namespace sparsecoll::plan {

// Entries are pieces, in the order in which ranks prefer to send them.
struct Timeline {
    Ticks finish = 0;
    std::vector<std::int32_t> row, piece;
    std::vector<std::int64_t> sent, arrived;
};

// row_bytes are the bytes on the wire of each row. Throws std::invalid_argument if rows do not fit the links or each other,
// std::overflow_error if a time does not fit 63 bits.
Timeline simulate(std::span<const Transfer> table, std::span<const std::int64_t> row_bytes, const Links& links,
                  bool gathers);

}  // namespace sparsecoll::plan
