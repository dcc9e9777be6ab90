// The planner as Python sees it: arrays come in as such, and are read without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "module.hpp"
#include "plan_division.hpp"
#include "plan_draft.hpp"
#include "plan_simulate.hpp"

namespace nb = nanobind;

namespace sparsecoll {
namespace {

nb::object int_of(plan::Ticks ticks) {
    constexpr int bits = 62;
    const auto low = static_cast<std::int64_t>(ticks & ((plan::Ticks{1} << bits) - 1));
    if (low == ticks) return nb::int_(low);
    return nb::int_(static_cast<std::int64_t>(ticks >> bits)) * nb::int_(std::int64_t{1} << bits) + nb::int_(low);
}

// The links of a topology, kept for all plans on it.
class Links {
  public:
    Links(std::vector<std::int32_t> node_of, std::vector<std::int64_t> up, std::vector<std::int64_t> out,
          std::vector<std::int64_t> node, std::int64_t up_latency, std::int64_t out_latency)
        : node_of_(std::move(node_of)),
          up_(std::move(up)),
          out_(std::move(out)),
          node_(std::move(node)),
          up_latency_(up_latency),
          out_latency_(out_latency) {
        bool is_sound = up_.size() == node_of_.size() && out_.size() == node_of_.size();
        for (std::int32_t each : node_of_) is_sound &= each >= 0 && static_cast<std::size_t>(each) < node_.size();
        for (const auto& costs : {up_, out_})
            for (std::int64_t cost : costs) is_sound &= cost > 0;
        if (!is_sound) throw std::invalid_argument("Links: expected a node and positive costs for every rank");
    }

    plan::Links view() const { return {node_of_, up_, out_, node_, up_latency_, out_latency_}; }

  private:
    std::vector<std::int32_t> node_of_;
    std::vector<std::int64_t> up_, out_, node_;
    std::int64_t up_latency_, out_latency_;
};

nb::tuple draft(const Links& links, const Input<std::int32_t>& owners, const Input<bool, 2>& holders,
                const Input<std::int64_t>& chunks, const Input<std::int64_t>& sizes,
                const Input<std::int64_t>& partial_sizes, bool gathers, bool divisible, bool shared_memory,
                std::string_view algorithm) {
    const plan::Case given{gathers,         divisible,        shared_memory,  span_of(owners),
                           holders.data(),  span_of(chunks),  span_of(sizes), span_of(partial_sizes),
                           links.view()};
    const std::size_t num_chunks = owners.size(), world_size = given.links.world_size();
    bool is_sound = holders.shape(0) == num_chunks && holders.shape(1) == world_size && sizes.size() == num_chunks &&
                    partial_sizes.size() == num_chunks;
    for (std::int32_t owner : given.owners) is_sound &= owner >= 0 && static_cast<std::size_t>(owner) < world_size;
    for (std::int64_t chunk : given.chunks) is_sound &= chunk >= 0 && static_cast<std::size_t>(chunk) < num_chunks;
    if (!is_sound) throw std::invalid_argument("draft: expected owners, holders and sizes of all chunks");
    plan::Draft made;
    {
        nb::gil_scoped_release release;
        made = plan::draft(given, algorithm);
    }
    auto* bytes = reinterpret_cast<const std::uint8_t*>(made.table.rows.get());
    const std::size_t num_bytes = made.table.size * sizeof(plan::Transfer);
    return nb::make_tuple(made.algorithm, int_of(made.expected),
                          array_of(bytes, num_bytes, std::move(made.table.rows)));
}

nb::tuple simulate(const Links& links, const Input<std::uint8_t>& table, const Input<std::int64_t>& row_bytes,
                   bool gathers) {
    const std::span rows(reinterpret_cast<const plan::Transfer*>(table.data()), table.size() / sizeof(plan::Transfer));
    if (row_bytes.size() != rows.size()) throw std::invalid_argument("simulate: expected bytes of every row");
    plan::Timeline timeline;
    {
        nb::gil_scoped_release release;
        timeline = plan::simulate(rows, span_of(row_bytes), links.view(), gathers);
    }
    return nb::make_tuple(int_of(timeline.finish), array_of(std::move(timeline.row)),
                          array_of(std::move(timeline.piece)), array_of(std::move(timeline.sent)),
                          array_of(std::move(timeline.arrived)));
}

using Shares = std::vector<std::vector<std::pair<std::int32_t, std::int64_t>>>;

std::pair<nb::object, Shares> divide(const std::vector<std::int64_t>& work, const std::vector<std::int64_t>& base,
                                     const std::vector<std::vector<std::int32_t>>& allowed,
                                     const std::vector<std::int64_t>& cost, std::int64_t floor,
                                     const std::vector<std::int32_t>& home, const std::vector<std::int32_t>& pool_of,
                                     const std::vector<std::int64_t>& pool_cost) {
    const std::vector<std::span<const std::int32_t>> bins(allowed.begin(), allowed.end());
    const std::vector<plan::Amount> amounts(work.begin(), work.end()), bases(base.begin(), base.end());
    const plan::Division division = plan::divide({amounts, bins, home}, {bases, cost, pool_of, pool_cost}, floor);
    Shares shares(work.size());
    for (std::size_t item = 0; item < work.size(); ++item)
        for (const plan::Share& share : division.of(item))
            shares[item].emplace_back(share.bin, static_cast<std::int64_t>(share.amount));
    return {int_of(division.level), std::move(shares)};
}

}  // namespace

void add_planner(nb::module_& module) {
    nb::class_<Links>(module, "Links")
        .def(nb::init<std::vector<std::int32_t>, std::vector<std::int64_t>, std::vector<std::int64_t>,
                      std::vector<std::int64_t>, std::int64_t, std::int64_t>());
    // Arrays are taken as they are: a copy in another type would hide that a caller pays for it.
    const auto exact = [](const char* name) { return nb::arg(name).noconvert(); };
    module.def("draft", &draft, nb::arg("links"), exact("owners"), exact("holders"), exact("chunks"), exact("sizes"),
               exact("partial_sizes"), nb::arg("gathers"), nb::arg("divisible"), nb::arg("shared_memory"),
               nb::arg("algorithm"));
    module.def("simulate", &simulate, nb::arg("links"), exact("table"), exact("row_bytes"), nb::arg("gathers"));
    module.def("divide", &divide);
}

}  // namespace sparsecoll
