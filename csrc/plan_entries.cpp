#include <numeric>

#include "plan_shares.hpp"

namespace sparsecoll::plan {
namespace {

std::size_t at(std::int32_t index) { return static_cast<std::size_t>(index); }

Ticks divide_down(Ticks amount, std::int64_t by) { return amount >= 0 ? amount / by : -((-amount + by - 1) / by); }

// A range of a chunk that other nodes let in alike.
struct Stretch {
    std::int64_t begin, end;
    std::int32_t relay;    // or nobody
    std::int32_t carrier;  // who sends it to other nodes
};

class Filling {
  public:
    Filling(const Schedule& schedule, const Between& between);

    Entries run() &&;

  private:
    Ticks least_inside() const;
    void take_relayed();
    void list_stretches(std::size_t item);
    void enter(std::size_t item, const Group& group);
    void enter_range(std::int64_t begin, std::int64_t end, std::span<const std::int32_t> ranks, std::int32_t place);
    Ticks room(std::int32_t rank, std::int64_t fanout) const {
        const Ticks space = in_capacity_[at(rank)] - in_[at(rank)];
        if (!fanout) return space;
        return std::min(space, divide_down(spread_capacity_[at(rank)] - entries_.spread[at(rank)], fanout));
    }
    void take(std::int32_t rank, std::int64_t bytes, std::int64_t fanout) {
        in_[at(rank)] += bytes;
        entries_.spread[at(rank)] += bytes * fanout;
    }

    const Schedule& schedule_;
    const Between& between_;
    std::vector<std::int32_t> place_of_;  // how many lower ranks share a rank's node
    std::vector<std::int64_t> in_;
    std::vector<Ticks> in_capacity_, spread_capacity_;
    std::vector<Stretch> stretches_;  // of one item
    Entries entries_;
};

Filling::Filling(const Schedule& schedule, const Between& between) : schedule_(schedule), between_(between) {
    const Links& links = schedule.links;
    const std::size_t world_size = links.world_size();
    std::vector<std::int32_t> count(links.node.size());
    for (std::int32_t node : links.node_of) place_of_.push_back(count[at(node)]++);
    in_.resize(world_size);
    entries_.spread.resize(world_size);
    entries_.begins.resize(schedule.size());
    entries_.level = std::max(between.level, least_inside());
    for (std::size_t rank = 0; rank < world_size; ++rank) {
        in_capacity_.push_back(entries_.level / links.out[rank]);
        spread_capacity_.push_back(entries_.level / links.up[rank]);
    }
}

// Ticks that some rank needs for what it gets from, or must send to, its own node.
Ticks Filling::least_inside() const {
    std::vector<std::int64_t> gets(in_.size()), sends(in_.size());
    for (std::size_t item = 0; item < schedule_.size(); ++item) {
        const auto inside = schedule_.at_home(item);
        const std::int64_t size = schedule_.sizes[item];
        for (std::int32_t rank : inside) gets[at(rank)] += rank != schedule_.owners[item] ? size : 0;
        if (inside.size() > 1)
            sends[at(schedule_.owners[item])] += inside.size() == 2 ? size : schedule_.first_bytes[item];
    }
    Ticks most = 0;
    for (std::size_t rank = 0; rank < gets.size(); ++rank)
        most = std::max(most, Ticks{std::max(gets[rank], sends[rank])} * schedule_.links.up[rank]);
    return most;
}

Entries Filling::run() && {
    take_relayed();
    std::vector<std::size_t> order(schedule_.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
        return schedule_.sizes[a] != schedule_.sizes[b] ? schedule_.sizes[a] > schedule_.sizes[b] : a < b;
    });
    std::size_t count = 0;
    for (std::size_t item : order) {
        entries_.begins[item] = count;
        if (!schedule_.num_others(item)) continue;
        count += schedule_.num_others(item);
        list_stretches(item);
        for (const Group& group : schedule_.groups(item))
            if (group.node != schedule_.homes[item]) enter(item, group);
    }
    return std::move(entries_);
}

// What a node relays enters at the rank that forwards it.
void Filling::take_relayed() {
    for (std::size_t item = 0; item < schedule_.size(); ++item) {
        std::int64_t begin = 0;
        for (const auto& [end, relay] : between_.relays.of(item)) {
            if (relay != nobody && schedule_.node_of(relay) != schedule_.homes[item]) {
                const std::size_t num_ranks = schedule_.members(item, schedule_.node_of(relay)).size();
                take(relay, end - begin, static_cast<std::int64_t>(num_ranks) - 1);
            }
            begin = end;
        }
    }
}

void Filling::list_stretches(std::size_t item) {
    const Parts relays = between_.relays.of(item), senders = between_.senders.of(item);
    std::vector<std::int64_t> cuts;
    for (const Part& part : relays) cuts.push_back(part.end);
    for (const Part& part : senders) cuts.push_back(part.end);
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    stretches_.clear();
    Cursor relay_at(relays), sender_at(senders);
    std::int64_t begin = 0;
    for (std::int64_t end : cuts) {
        const std::int32_t relay = relay_at.at(begin);
        const bool from_home = relay == nobody || schedule_.node_of(relay) == schedule_.homes[item];
        stretches_.push_back({begin, end, relay, from_home ? sender_at.at(begin) : relay});
        begin = end;
    }
}

void Filling::enter(std::size_t, const Group& group) {
    auto& parts = entries_.entrances.parts();
    const std::size_t first = parts.size();
    for (const auto& [begin, end, relay, carrier] : stretches_) {
        if (relay != nobody && schedule_.node_of(relay) == group.node) {
            parts.push_back({end, relay});
        } else {
            enter_range(begin, end, group.ranks, place_of_[at(carrier)]);
        }
    }
    join_parts(parts, first);
    entries_.entrances.close();
}

// Lets a range in at the rank with its carrier's place in the node, or else where most room is.
void Filling::enter_range(std::int64_t begin, std::int64_t end, std::span<const std::int32_t> ranks,
                          std::int32_t place) {
    const std::int64_t granule = schedule_.granule_bytes();
    const auto fanout = static_cast<std::int64_t>(ranks.size()) - 1;
    const auto twin = std::find_if(ranks.begin(), ranks.end(), [&](std::int32_t r) { return place_of_[at(r)] == place; });
    while (begin < end) {
        std::int32_t rank = twin == ranks.end() ? nobody : *twin;
        if (rank == nobody || room(rank, fanout) < end - begin) {
            rank = ranks[0];
            for (std::int32_t other : ranks)
                if (room(other, fanout) > room(rank, fanout)) rank = other;
        }
        Ticks length = std::min(Ticks{end - begin}, divide_down(room(rank, fanout), granule) * granule);
        if (length <= 0 || end - begin - length < granule) length = end - begin;
        take(rank, static_cast<std::int64_t>(length), fanout);
        begin += static_cast<std::int64_t>(length);
        entries_.entrances.parts().push_back({begin, rank});
    }
}

}  // namespace

Entries share_entries(const Schedule& schedule, const Between& between) { return Filling(schedule, between).run(); }

Partitions share_inside(const Schedule& schedule, const Entries& entries) {
    std::vector<std::int64_t> base = entries.spread, bytes;
    std::vector<std::span<const std::int32_t>> allowed;
    for (std::size_t item = 0; item < schedule.size(); ++item) {
        const auto ranks = schedule.at_home(item);
        const auto count = static_cast<std::int64_t>(ranks.size());
        const std::int64_t size = schedule.sizes[item];
        if (count > 1) base[at(schedule.owners[item])] += count == 2 ? size : schedule.first_bytes[item];
        bytes.push_back(count > 2 ? (count - 2) * size : 0);
        allowed.push_back(count > 2 ? ranks : std::span<const std::int32_t>());
    }
    const Division division = divide({bytes, allowed, schedule.owners}, {base, schedule.links.up, {}, {}}, entries.level);
    Partitions relays;
    for (std::size_t item = 0; item < schedule.size(); ++item) {
        add_parts(relays.parts(), division.of(item), schedule.owners[item], schedule.sizes[item],
                  schedule.granule_bytes());
        relays.close();
    }
    return relays;
}

}  // namespace sparsecoll::plan
