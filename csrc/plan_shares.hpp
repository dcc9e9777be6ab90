// Who does which part of a relayed schedule: between nodes, where nodes are entered, and inside the owner's node.
#pragma once

#include <cstdint>
#include <vector>

#include "plan_schedule.hpp"

namespace sparsecoll::plan {

// Where relays have room they are filled to one part in so many less than the busiest link, and catch up with it.
constexpr int slack = 12;

struct Between {
    Partitions relays;   // of each item: who sends a range to the other nodes but one; nobody where only one has it
    Partitions senders;  // of each item: who in the owner's node sends a range to that one, or to the relay elsewhere
    Ticks level;
};

Between share_between(const Schedule& schedule);

struct Entries {
    Partitions entrances;              // of each node but the owner's: at whom a range comes in
    std::vector<std::size_t> begins;   // of each item, into entrances; its other nodes ascend
    std::vector<std::int64_t> spread;  // of each rank: bytes that it sends inside its node because it let them in
    Ticks level;
};

Entries share_entries(const Schedule& schedule, const Between& between);

// Of each item: which rank of the owner's node forwards a range to the others there; the owner sends to all.
Partitions share_inside(const Schedule& schedule, const Entries& entries);

}  // namespace sparsecoll::plan
