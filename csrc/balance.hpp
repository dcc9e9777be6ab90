// What the native balancers work on. They take the same steps as the readable ones in sparsecoll/balance, in the same
// order, and give the same integers; reasons stand there. Nothing here knows Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace sparsecoll::balance {

// Loads of a layer, and who holds its experts; an owner is among the holders.
struct Layer {
    std::span<const std::int64_t> loads;  // [world_size, num_experts]
    std::span<const std::int32_t> owners;
    const bool* holders;  // [num_experts, world_size]
    std::size_t world_size;

    std::size_t num_experts() const { return owners.size(); }
    std::int64_t load(std::size_t rank, std::size_t expert) const { return loads[rank * num_experts() + expert]; }
    bool holds(std::size_t rank, std::size_t expert) const { return holders[expert * world_size + rank]; }
};

// Assignments that another rank than the owner computes.
struct Move {
    std::int64_t expert, rank, amount;
};
static_assert(sizeof(Move) == 3 * sizeof(std::int64_t));

// As sparsecoll.balance.relief.Relief.
struct Relief {
    std::int64_t level, traffic, copies;
    std::vector<Move> moves;
};

std::vector<Relief> relieve_ranks(const Layer& layer, std::int64_t most, std::int64_t min_tokens);

// Quotas [num_experts, world_size]; node_of has the node of each rank, counted from 0.
std::vector<std::int64_t> divide_loads(const Layer& layer, std::span<const std::int32_t> node_of);

}  // namespace sparsecoll::balance
