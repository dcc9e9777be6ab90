#include "plan_shares.hpp"

namespace sparsecoll::plan {
namespace {

std::size_t at(std::int32_t index) { return static_cast<std::size_t>(index); }

Division divide_out(const Schedule& schedule, const Work& work, std::span<const std::int64_t> base, Ticks floor) {
    const Links& links = schedule.links;
    return divide(work, {base, links.out, links.node_of, links.node}, floor);
}

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

// Two items of work for each chunk: forwarding to other nodes, and sending out what is forwarded.
Division divide_forwarding(const Schedule& schedule) {
    std::vector<std::int64_t> bytes;
    std::vector<std::span<const std::int32_t>> allowed;
    std::vector<std::int32_t> home;
    for (std::size_t item = 0; item < schedule.size(); ++item) {
        const auto others = static_cast<std::int64_t>(schedule.num_others(item));
        const std::int64_t size = schedule.sizes[item];
        bytes.push_back(others ? (others - 1) * size : 0);
        bytes.push_back(others ? others == 1 ? size : schedule.first_bytes[item] : 0);
        allowed.push_back(schedule.holdings.of(item));
        allowed.push_back(schedule.at_home(item));
        home.insert(home.end(), 2, schedule.owners[item]);
    }
    const std::vector<std::int64_t> base(schedule.links.world_size());
    return divide_out(schedule, {bytes, allowed, home}, base, arriving(schedule));
}

// Who sends relays their ranges, now that it is known who sends what to all other nodes by itself.
Division divide_sending(const Schedule& schedule, const Partitions& relays, Ticks level) {
    std::vector<std::int64_t> base(schedule.links.world_size()), bytes;
    std::vector<std::span<const std::int32_t>> allowed;
    for (std::size_t item = 0; item < schedule.size(); ++item) {
        const auto others = static_cast<std::int64_t>(schedule.num_others(item));
        std::int64_t given = 0, begin = 0;
        for (const auto& [end, relay] : relays.of(item)) {
            const std::int64_t length = end - begin;
            if (others && relay == nobody) {
                given += length;
            } else if (others && schedule.node_of(relay) == schedule.homes[item]) {
                base[at(relay)] += length * others;
            } else if (others) {
                base[at(relay)] += length * (others - 1);
                given += Schedule::scaled(length, schedule.first_bytes[item], schedule.sizes[item]);
            }
            begin = end;
        }
        bytes.push_back(given);
        allowed.push_back(schedule.at_home(item));
    }
    return divide_out(schedule, {bytes, allowed, schedule.owners}, base, level);
}

// Lays shares along the ranges that are not sent by a relay in the owner's node itself.
void add_senders(std::vector<Part>& parts, const Schedule& schedule, std::size_t item, Parts relays,
                 std::span<const Share> shares) {
    const auto is_at_home = [&](std::int32_t relay) {
        return relay != nobody && schedule.node_of(relay) == schedule.homes[item];
    };
    std::int64_t given = 0, begin = 0;
    for (const auto& [end, relay] : relays) {
        given += is_at_home(relay) ? 0 : end - begin;
        begin = end;
    }
    std::vector<Part> cuts;
    if (given) add_parts(cuts, shares, schedule.owners[item], given, schedule.granule_bytes());
    const std::size_t first = parts.size();
    std::int64_t passed = 0;  // of given, before this range
    std::size_t turn = 0;
    begin = 0;
    for (const auto& [end, relay] : relays) {
        if (is_at_home(relay)) {
            parts.push_back({end, relay});
        } else {
            while (cuts.at(turn).end - passed < end - begin) {
                parts.push_back({begin + cuts[turn].end - passed, cuts[turn].who});
                ++turn;
            }
            parts.push_back({end, cuts[turn].who});
            passed += end - begin;
            turn += cuts[turn].end == passed;
        }
        begin = end;
    }
    join_parts(parts, first);
}

}  // namespace

Between share_between(const Schedule& schedule) {
    Between between;
    const Division forwarding = divide_forwarding(schedule);
    for (std::size_t item = 0; item < schedule.size(); ++item) {
        const std::int32_t otherwise = schedule.num_others(item) > 1 ? schedule.owners[item] : nobody;
        add_parts(between.relays.parts(), forwarding.of(2 * item), otherwise, schedule.sizes[item],
                  schedule.granule_bytes());
        between.relays.close();
    }
    const Division sending = divide_sending(schedule, between.relays, forwarding.level);
    for (std::size_t item = 0; item < schedule.size(); ++item) {
        add_senders(between.senders.parts(), schedule, item, between.relays.of(item), sending.of(item));
        between.senders.close();
    }
    between.level = sending.level;
    return between;
}

}  // namespace sparsecoll::plan
