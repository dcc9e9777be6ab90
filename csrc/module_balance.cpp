// The balancers as Python sees them: arrays come in as such, and are read without the GIL.
#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "balance.hpp"
#include "module.hpp"

namespace nb = nanobind;

namespace sparsecoll {
namespace {

balance::Layer layer_of(const Input<std::int64_t, 2>& loads, const Input<std::int32_t>& owners,
                        const Input<bool, 2>& holders) {
    const std::size_t num_experts = owners.size(), world_size = loads.shape(0);
    bool is_sound = world_size > 0 && loads.shape(1) == num_experts && holders.shape(0) == num_experts &&
                    holders.shape(1) == world_size;
    for (std::int32_t owner : span_of(owners)) is_sound &= owner >= 0 && static_cast<std::size_t>(owner) < world_size;
    if (!is_sound) throw std::invalid_argument("expected loads, owners and holders of the same ranks and experts");
    return {{loads.data(), loads.size()}, span_of(owners), holders.data(), world_size};
}

// Three numbers for each move.
Output<std::int64_t> table_of(std::vector<balance::Move>&& moves) {
    auto* numbers = reinterpret_cast<std::int64_t*>(moves.data());
    const std::size_t size = 3 * moves.size();
    return array_of(numbers, size, std::move(moves));
}

nb::list relieve_ranks(const Input<std::int64_t, 2>& loads, const Input<std::int32_t>& owners,
                      const Input<bool, 2>& holders, std::int64_t most, std::int64_t min_tokens) {
    const balance::Layer layer = layer_of(loads, owners, holders);
    std::vector<balance::Relief> found;
    {
        nb::gil_scoped_release release;
        found = balance::relieve_ranks(layer, most, min_tokens);
    }
    nb::list reliefs;
    for (balance::Relief& each : found)
        reliefs.append(nb::make_tuple(each.level, each.traffic, each.copies, table_of(std::move(each.moves))));
    return reliefs;
}

Output<std::int64_t> divide_loads(const Input<std::int64_t, 2>& loads, const Input<std::int32_t>& owners,
                                  const Input<bool, 2>& holders, const Input<std::int32_t>& node_of) {
    const balance::Layer layer = layer_of(loads, owners, holders);
    if (node_of.size() != layer.world_size) throw std::invalid_argument("expected a node of every rank");
    std::vector<std::int64_t> quotas;
    {
        nb::gil_scoped_release release;
        quotas = balance::divide_loads(layer, span_of(node_of));
    }
    return array_of(std::move(quotas));
}

}  // namespace

void add_balancers(nb::module_& module) {
    const auto exact = [](const char* name) { return nb::arg(name).noconvert(); };
    module.def("relieve_ranks", &relieve_ranks, exact("loads"), exact("owners"), exact("holders"), nb::arg("most"),
               nb::arg("min_tokens"));
    module.def("divide_loads", &divide_loads, exact("loads"), exact("owners"), exact("holders"), exact("node_of"));
}

}  // namespace sparsecoll
