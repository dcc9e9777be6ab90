// What the native planner works on. It takes the same steps as the readable one in sparsecoll/plan, in the same order,
// and gives the same bytes; reasons stand there. Integers only. Nothing here knows Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace sparsecoll::plan {

// A time: up to 63 bits of bytes, times up to 25 bits of ticks for each.
using Ticks = __int128;

// Bytes, or as many as stand for what they cost elsewhere.
using Amount = __int128;

// A row of sparsecoll.plan.transfer.TRANSFER. Its padding is written too, as digests are of all its bytes.
struct Transfer {
    std::int32_t stage, span, src, dst, chunk, pieces;
    std::int64_t begin, end;
    std::uint8_t partial;
    std::uint8_t padding[7];
};
static_assert(sizeof(Transfer) == 48 && offsetof(Transfer, begin) == 24 && offsetof(Transfer, partial) == 40);

// Transfers in memory that can be handed on.
struct Table {
    std::unique_ptr<Transfer[]> rows;
    std::size_t size = 0;
};

// Ticks that a byte takes every link, and a message to arrive; as sparsecoll.plan.costs.Costs, with the nodes of ranks.
struct Links {
    std::span<const std::int32_t> node_of;
    std::span<const std::int64_t> up, out, node;
    std::int64_t up_latency, out_latency;

    std::size_t world_size() const { return node_of.size(); }
    bool cross(std::int32_t src, std::int32_t dst) const {
        return node_of[static_cast<std::size_t>(src)] != node_of[static_cast<std::size_t>(dst)];
    }
};

// As sparsecoll.plan.algorithms.Case; chunks are those that move.
struct Case {
    bool gathers;
    bool divisible;
    bool shared_memory;  // relays inside a node spare nobody anything
    std::span<const std::int32_t> owners;
    const bool* holders;  // [num_chunks, world_size]
    std::span<const std::int64_t> chunks, sizes, partial_sizes;
    Links links;
};

}  // namespace sparsecoll::plan
