#include "plan_shares.hpp"

namespace sparsecoll::plan {
namespace {

std::size_t at(std::int32_t index) { return static_cast<std::size_t>(index); }

// What the carrier sends to a node, or what node it is a relay of.
struct Range {
    std::int64_t begin, end;
    std::int32_t carrier;
    std::span<const std::int32_t> ranks;  // that hold the chunk there

    std::int64_t length() const { return end - begin; }
    std::int64_t fanout() const { return static_cast<std::int64_t>(ranks.size()) - 1; }
};

// Ranges of all chunks. Those of an item come node by node within each stretch of it, as many as it has other nodes.
struct Ranges {
    std::vector<Range> all;
    std::vector<std::size_t> begins{0};  // of each item

    Ranges(const Schedule& schedule, const Between& between) {
        std::vector<std::int64_t> cuts;
        for (std::size_t item = 0; item < schedule.size(); ++item) {
            if (schedule.num_others(item)) add(schedule, item, between.relays.of(item), between.senders.of(item), cuts);
            begins.push_back(all.size());
        }
    }

    void add(const Schedule& schedule, std::size_t item, Parts relays, Parts senders, std::vector<std::int64_t>& cuts) {
        cuts.clear();
        for (const Part& part : relays) cuts.push_back(part.end);
        for (const Part& part : senders) cuts.push_back(part.end);
        std::sort(cuts.begin(), cuts.end());
        cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
        Cursor relay_at(relays), sender_at(senders);
        std::int64_t begin = 0;
        for (std::int64_t end : cuts) {
            const std::int32_t relay = relay_at.at(begin), sender = sender_at.at(begin);
            const std::int32_t relay_node = relay == nobody ? schedule.homes[item] : schedule.node_of(relay);
            const bool at_home = relay_node == schedule.homes[item];
            bool is_first = true;
            for (const Group& group : schedule.groups(item)) {
                if (group.node == schedule.homes[item]) continue;
                const std::int32_t carrier = at_home && is_first ? sender : relay;
                all.push_back({begin, end, carrier, group.ranks});
                is_first = false;
            }
            begin = end;
        }
    }
};

// Ticks that some rank needs for what it gets from, or must send to, its own node.
Ticks least_inside(const Schedule& schedule) {
    std::vector<std::int64_t> gets(schedule.links.world_size()), sends(schedule.links.world_size());
    for (std::size_t item = 0; item < schedule.size(); ++item) {
        const auto inside = schedule.at_home(item);
        const std::int64_t size = schedule.sizes[item];
        for (std::int32_t rank : inside) gets[at(rank)] += rank != schedule.owners[item] ? size : 0;
        if (inside.size() > 1)
            sends[at(schedule.owners[item])] += inside.size() == 2 ? size : schedule.first_bytes[item];
    }
    Ticks most = 0;
    for (std::size_t rank = 0; rank < gets.size(); ++rank)
        most = std::max(most, Ticks{std::max(gets[rank], sends[rank])} * schedule.links.up[rank]);
    return most;
}

// Divides entries so that neither what ranks let in nor what they then spread is more than it must be. A range enters
// at the rank that has its carrier's place in the node, if there is room: in its own node at the relay itself.
Division divide_entries(const Schedule& schedule, const Ranges& ranges, Ticks floor) {
    const Links& links = schedule.links;
    std::vector<std::int32_t> place_of, counts(links.node.size());  // how many lower ranks share a rank's node
    for (std::int32_t node : links.node_of) place_of.push_back(counts[at(node)]++);
    const std::vector<Amount> base(links.world_size());
    std::vector<Amount> amounts;
    std::vector<std::span<const std::int32_t>> allowed;
    std::vector<std::int32_t> home;
    for (const Range& range : ranges.all) {
        // Bytes that a rank lets in, or as many as stand for what it costs to spread them where that is more.
        const std::int32_t rank = range.ranks[0];
        const Amount spread = Amount{range.length()} * range.fanout() * links.up[at(rank)] / links.out[at(rank)];
        const Amount amount = std::max(Amount{range.length()}, spread);
        const std::int32_t place = place_of[at(range.carrier)];
        const auto twin = std::find_if(range.ranks.begin(), range.ranks.end(),
                                       [&](std::int32_t each) { return place_of[at(each)] == place; });
        amounts.push_back(amount);
        allowed.push_back(range.ranks);
        home.push_back(twin == range.ranks.end() ? nobody : *twin);
    }
    return divide({amounts, allowed, home}, {base, links.out, {}, {}}, floor);
}

}  // namespace

Entries share_entries(const Schedule& schedule, const Between& between) {
    const Ranges ranges(schedule, between);
    const Division division = divide_entries(schedule, ranges, std::max(between.level, least_inside(schedule)));
    Entries entries{{}, {}, std::vector<std::int64_t>(schedule.links.world_size()), division.level};
    auto& parts = entries.entrances.parts();
    std::size_t num_partitions = 0;
    for (std::size_t item = 0; item < schedule.size(); ++item) {
        const std::size_t num_others = schedule.num_others(item);
        entries.begins.push_back(num_partitions);
        num_partitions += num_others;
        for (std::size_t other = 0; other < num_others; ++other) {
            for (std::size_t index = ranges.begins[item] + other; index < ranges.begins[item + 1]; index += num_others) {
                const Range& range = ranges.all[index];
                const std::size_t first = parts.size();
                add_parts(parts, division.of(index), nobody, range.length(), schedule.granule_bytes());
                std::int64_t begin = 0;
                for (std::size_t part = first; part < parts.size(); ++part) {
                    const std::int64_t end = parts[part].end;
                    entries.spread[at(parts[part].who)] += (end - begin) * range.fanout();
                    parts[part].end += range.begin;
                    begin = end;
                }
            }
            entries.entrances.close();
        }
    }
    return entries;
}

Partitions share_inside(const Schedule& schedule, const Entries& entries) {
    std::vector<Amount> base(entries.spread.begin(), entries.spread.end()), amounts;
    std::vector<std::span<const std::int32_t>> allowed;
    for (std::size_t item = 0; item < schedule.size(); ++item) {
        const auto ranks = schedule.at_home(item);
        const auto count = static_cast<std::int64_t>(ranks.size());
        const std::int64_t size = schedule.sizes[item];
        if (count > 1) base[at(schedule.owners[item])] += count == 2 ? size : schedule.first_bytes[item];
        amounts.push_back(count > 2 ? (count - 2) * size : 0);
        allowed.push_back(count > 2 ? ranks : std::span<const std::int32_t>());
    }
    const Links& links = schedule.links;
    const Ticks floor = entries.level - entries.level / slack;
    const Division division = divide({amounts, allowed, schedule.owners}, {base, links.up, {}, {}}, floor);
    Partitions relays;
    for (std::size_t item = 0; item < schedule.size(); ++item) {
        add_parts(relays.parts(), division.of(item), schedule.owners[item], schedule.sizes[item],
                  schedule.granule_bytes());
        relays.close();
    }
    return relays;
}

}  // namespace sparsecoll::plan
