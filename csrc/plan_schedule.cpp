#include "plan_schedule.hpp"

namespace sparsecoll::plan {
namespace {

constexpr std::int64_t no_node_cost[] = {0};

// size * part / total, rounded down, for a part of at most the total.
std::int64_t scaled(std::int64_t size, Amount part, Amount total) {
    if (total < Amount{1} << 63) return static_cast<std::int64_t>(part * size / total);
    const Amount high = part * (size >> 32);  // in two steps, as the product may have more than 127 bits
    const Amount low = (high % total << 32) + part * (size & 0xffffffff);
    return static_cast<std::int64_t>((high / total << 32) + low / total);
}

}  // namespace

Schedule::Schedule(const Case& given, const Holdings& holdings_, bool has_levels)
    : holdings(holdings_), links(given.links), divisible(given.divisible) {
    const std::size_t world_size = links.world_size();
    if (!has_levels && 1 < links.node.size() && links.node.size() < world_size) {
        one_node_.assign(world_size, 0);
        slowest_.resize(world_size);
        for (std::size_t rank = 0; rank < world_size; ++rank) slowest_[rank] = std::max(links.up[rank], links.out[rank]);
        links.node_of = one_node_;
        links.up = slowest_;
        links.node = no_node_cost;
    }
    const bool in_order = std::is_sorted(links.node_of.begin(), links.node_of.end());
    if (!in_order) by_node_.reserve(holdings.ranks.size());
    group_begins_.reserve(holdings.size() + 1);
    groups_.reserve(holdings.size());
    for (std::size_t item = 0; item < holdings.size(); ++item) {
        const auto chunk = static_cast<std::size_t>(holdings.chunks[item]);
        sizes.push_back(given.sizes[chunk]);
        first_bytes.push_back((given.gathers ? given.sizes : given.partial_sizes)[chunk]);
        owners.push_back(given.owners[chunk]);
        homes.push_back(node_of(owners.back()));
        std::span<const std::int32_t> ranks = holdings.of(item);
        if (!in_order) {
            const auto begin = by_node_.insert(by_node_.end(), ranks.begin(), ranks.end());
            std::sort(begin, by_node_.end(), [&](std::int32_t a, std::int32_t b) {
                return node_of(a) != node_of(b) ? node_of(a) < node_of(b) : a < b;
            });
            ranks = {begin, by_node_.end()};
        }
        for (std::size_t begin = 0, end = 0; begin < ranks.size(); begin = end) {
            while (end < ranks.size() && node_of(ranks[end]) == node_of(ranks[begin])) ++end;
            groups_.push_back({node_of(ranks[begin]), ranks.subspan(begin, end - begin)});
        }
        group_begins_.push_back(groups_.size());
    }
}

void add_parts(std::vector<Part>& parts, std::span<const Share> shares, std::int32_t owner, std::int64_t size,
               std::int64_t granule) {
    if (shares.empty()) {
        parts.push_back({size, owner});
        return;
    }
    const std::size_t first = parts.size();
    Amount total = 0, done = 0;
    for (const Share& share : shares) total += share.amount;
    for (const Share& share : shares) {
        done += share.amount;
        const std::int64_t end = done < total ? (scaled(size, done, total) + granule / 2) / granule * granule : size;
        if (end > (parts.size() > first ? parts.back().end : 0)) parts.push_back({std::min(end, size), share.bin});
    }
    if (parts.back().end < size) parts.back().end = size;
}

}  // namespace sparsecoll::plan
