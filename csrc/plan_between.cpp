#include "plan_shares.hpp"

namespace sparsecoll::plan {
namespace {

std::size_t at(std::int32_t index) { return static_cast<std::size_t>(index); }

// Ticks that a byte takes a node: its shared link, or the links of its ranks together.
std::vector<std::int64_t> node_costs(const Links& links) {
    constexpr std::int64_t unit = std::int64_t{1} << 40;
    std::vector<std::int64_t> rates(links.node.size());
    for (std::size_t rank = 0; rank < links.world_size(); ++rank)
        rates[at(links.node_of[rank])] += unit / links.out[rank];
    std::vector<std::int64_t> costs;
    for (std::size_t node = 0; node < rates.size(); ++node)
        costs.push_back(std::max(links.node[node], unit / rates[node]));
    return costs;
}

// Ticks that some node, or some rank that is a node's only holder, needs to let its chunks in.
Ticks arriving(const Schedule& schedule) {
    const Links& links = schedule.links;
    std::vector<std::int64_t> nodes(links.node.size()), ranks(links.world_size());
    for (std::size_t item = 0; item < schedule.size(); ++item) {
        for (const Group& group : schedule.groups(item)) {
            if (group.node == schedule.homes[item]) continue;
            nodes[at(group.node)] += schedule.sizes[item];
            if (group.ranks.size() == 1) ranks[at(group.ranks[0])] += schedule.sizes[item];
        }
    }
    const std::vector<std::int64_t> costs = node_costs(links);
    Ticks most = 0;
    for (std::size_t node = 0; node < nodes.size(); ++node) most = std::max(most, Ticks{nodes[node]} * costs[node]);
    for (std::size_t rank = 0; rank < ranks.size(); ++rank) most = std::max(most, Ticks{ranks[rank]} * links.out[rank]);
    return most;
}

// Two items for each chunk: what holders forward to all other nodes but one, and what must leave its node.
Division divide_out(const Schedule& schedule) {
    std::vector<Amount> amounts;
    std::vector<std::span<const std::int32_t>> allowed;
    std::vector<std::int32_t> home;
    for (std::size_t item = 0; item < schedule.size(); ++item) {
        const auto others = static_cast<std::int64_t>(schedule.num_others(item));
        const std::int64_t size = schedule.sizes[item];
        amounts.push_back(others ? (others - 1) * size : 0);
        amounts.push_back(others ? others == 1 ? size : schedule.first_bytes[item] : 0);
        allowed.push_back(schedule.holdings.of(item));
        allowed.push_back(schedule.at_home(item));
        home.insert(home.end(), 2, schedule.owners[item]);
    }
    const Links& links = schedule.links;
    const std::vector<Amount> base(links.world_size());
    const Ticks floor = arriving(schedule);
    return divide({amounts, allowed, home}, {base, links.out, links.node_of, links.node}, floor - floor / slack);
}

}  // namespace

Between share_between(const Schedule& schedule) {
    const Division division = divide_out(schedule);
    Between between{{}, {}, division.level};
    for (std::size_t item = 0; item < schedule.size(); ++item) {
        const std::int32_t owner = schedule.owners[item];
        const std::int64_t size = schedule.sizes[item], granule = schedule.granule_bytes();
        const std::int32_t otherwise = schedule.num_others(item) > 1 ? owner : nobody;
        add_parts(between.relays.parts(), division.of(2 * item), otherwise, size, granule);
        add_parts(between.senders.parts(), division.of(2 * item + 1), owner, size, granule);
        between.relays.close();
        between.senders.close();
    }
    return between;
}

}  // namespace sparsecoll::plan
