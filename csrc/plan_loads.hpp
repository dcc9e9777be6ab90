// What every link carries in a schedule.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "plan.hpp"

namespace sparsecoll::plan {

class Loads {
  public:
    explicit Loads(const Links& links) : links_(links) {
        for (Side& side : sides_) {
            side.up.resize(links.up.size());
            side.out.resize(links.out.size());
            side.node.resize(links.node.size());
        }
    }

    void send(std::int32_t rank, bool crosses, std::int64_t bytes) { add(sides_[0], rank, crosses, bytes); }
    void receive(std::int32_t rank, bool crosses, std::int64_t bytes) { add(sides_[1], rank, crosses, bytes); }

    // Ticks that the busiest link needs.
    Ticks busiest() const {
        Ticks most = 0;
        for (const Side& side : sides_) {
            most = std::max(most, longest(side.up, links_.up));
            most = std::max(most, longest(side.out, links_.out));
            most = std::max(most, longest(side.node, links_.node));
        }
        return most;
    }

  private:
    struct Side {
        std::vector<std::int64_t> up, out, node;
    };

    void add(Side& side, std::int32_t rank, bool crosses, std::int64_t bytes) {
        const auto index = static_cast<std::size_t>(rank);
        if (crosses) {
            side.out[index] += bytes;
            side.node[static_cast<std::size_t>(links_.node_of[index])] += bytes;
        } else {
            side.up[index] += bytes;
        }
    }

    static Ticks longest(const std::vector<std::int64_t>& loads, std::span<const std::int64_t> costs) {
        Ticks most = 0;
        for (std::size_t link = 0; link < loads.size(); ++link) most = std::max(most, Ticks{loads[link]} * costs[link]);
        return most;
    }

    const Links& links_;
    std::array<Side, 2> sides_;
};

}  // namespace sparsecoll::plan
