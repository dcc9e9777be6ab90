// The parts of the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace sparsecoll {

void add_planner(nanobind::module_& module);

}  // namespace sparsecoll
