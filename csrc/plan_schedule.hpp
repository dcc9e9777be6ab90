// What relayed schedules are made of; sparsecoll/plan/trees.py says how they come about.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "plan.hpp"
#include "plan_division.hpp"
#include "plan_holdings.hpp"

namespace sparsecoll::plan {

// A range of a chunk, which begins where the one before it ends, and who has it.
struct Part {
    std::int64_t end;
    std::int32_t who;
};
using Parts = std::span<const Part>;

// Parts of many chunks, in the order in which they were added.
class Partitions {
  public:
    std::vector<Part>& parts() { return parts_; }
    void close() { begins_.push_back(parts_.size()); }
    std::size_t begin_of_last() const { return begins_.back(); }
    Parts of(std::size_t index) const {
        return std::span(parts_).subspan(begins_[index], begins_[index + 1] - begins_[index]);
    }

  private:
    std::vector<Part> parts_;
    std::vector<std::size_t> begins_{0};
};

// Who has a place in a chunk, for places that ascend.
class Cursor {
  public:
    explicit Cursor(Parts parts) : parts_(parts) {}
    std::int32_t at(std::int64_t place) {
        while (parts_[turn_].end <= place) ++turn_;
        return parts_[turn_].who;
    }

  private:
    Parts parts_;
    std::size_t turn_ = 0;
};

// A node with holders of a chunk, and those holders.
struct Group {
    std::int32_t node;
    std::span<const std::int32_t> ranks;
};

// What to move where; vectors have an entry for each item.
struct Schedule {
    const Holdings& holdings;
    Links links;
    bool divisible;
    std::vector<std::int64_t> sizes;
    std::vector<std::int64_t> first_bytes;  // of what a relay and the owner exchange
    std::vector<std::int32_t> owners;
    std::vector<std::int32_t> homes;  // node of the owner

    // With nodes, or as if all ranks were on one.
    Schedule(const Case& given, const Holdings& holdings, bool has_levels);
    Schedule(const Schedule&) = delete;

    std::size_t size() const { return sizes.size(); }
    std::int64_t granule_bytes() const { return divisible ? 64 : std::int64_t{1} << 62; }
    std::int32_t node_of(std::int32_t rank) const { return links.node_of[static_cast<std::size_t>(rank)]; }
    std::span<const Group> groups(std::size_t item) const {  // nodes ascending
        return std::span(groups_).subspan(group_begins_[item], group_begins_[item + 1] - group_begins_[item]);
    }
    std::span<const std::int32_t> members(std::size_t item, std::int32_t node) const {
        const auto found = groups(item);
        return std::lower_bound(found.begin(), found.end(), node,
                                [](const Group& group, std::int32_t wanted) { return group.node < wanted; })
            ->ranks;
    }
    std::span<const std::int32_t> at_home(std::size_t item) const { return members(item, homes[item]); }
    std::size_t num_others(std::size_t item) const { return groups(item).size() - 1; }

    // amount * of / in, rounded down.
    static std::int64_t scaled(std::int64_t amount, std::int64_t of, std::int64_t in) {
        return static_cast<std::int64_t>(Ticks{amount} * of / in);
    }

  private:
    std::vector<std::int64_t> slowest_;
    std::vector<std::int32_t> one_node_;
    std::vector<std::int32_t> by_node_;  // holders, sorted by node
    std::vector<Group> groups_;
    std::vector<std::size_t> group_begins_{0};
};

// Appends shares of work as ranges as long, at multiples of the granule; without any the owner has it all.
void add_parts(std::vector<Part>& parts, std::span<const Share> shares, std::int32_t owner, std::int64_t size,
               std::int64_t granule);

}  // namespace sparsecoll::plan
