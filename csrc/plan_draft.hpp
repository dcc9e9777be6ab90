// The algorithms; sparsecoll/plan/algorithms.py says what they do.
#pragma once

#include <string_view>

#include "plan.hpp"

namespace sparsecoll::plan {

struct Draft {
    std::string_view algorithm;  // which one made it
    Ticks expected;              // that it takes
    Table table;
};

// algorithm: direct, dense, relay, hierarchical, or auto for the best of all.
// Throws std::invalid_argument for another one.
Draft draft(const Case& given, std::string_view algorithm);

}  // namespace sparsecoll::plan
