#include "plan_trees.hpp"

#include <algorithm>

#include "plan_loads.hpp"

namespace sparsecoll::plan {
namespace {

constexpr std::int32_t slots = 1024;
constexpr std::int32_t lead = slots / 8;
constexpr std::int64_t most_pieces = 32;
constexpr std::int64_t least_piece_bytes = 1 << 14;
constexpr std::int64_t messages_per_latency = 512;

std::size_t at(std::int32_t index) { return static_cast<std::size_t>(index); }

Ticks divide_up(Ticks amount, Ticks by) { return (amount + by - 1) / by; }

// As many pieces as balance the filling of the pipeline against the messages that they cost.
std::int64_t choose_pieces(Ticks level, std::int64_t depth, std::int64_t fanout, std::int64_t latency) {
    const std::int64_t most = depth < 3 ? most_pieces : 2 * most_pieces;
    const Ticks message_ticks = Ticks{fanout} * latency / messages_per_latency;
    if (!message_ticks) return most;
    const Ticks square = level / message_ticks;
    std::int64_t best = 1;
    while (best < most && Ticks{best + 1} * (best + 1) <= square) ++best;
    return best;
}

}  // namespace

Trees::Trees(const Case& given, const Holdings& holdings, bool has_levels)
    : schedule_(given, holdings, has_levels), mirrored_(!given.gathers) {
    const Between between = share_between(schedule_);
    const Entries entries = share_entries(schedule_, between);
    add_cells(between, entries, share_inside(schedule_, entries));
    measure();
}

void Trees::add_cells(const Between& between, const Entries& entries, const Partitions& inside) {
    std::vector<std::int64_t> cuts;
    std::vector<Cursor> entrance_at;
    Roles roles;
    for (std::size_t item = 0; item < schedule_.size(); ++item) {
        cuts.clear();
        entrance_at.clear();
        const auto cut = [&](Parts parts) {
            for (const Part& part : parts) cuts.push_back(part.end);
        };
        cut(between.relays.of(item));
        cut(between.senders.of(item));
        cut(inside.of(item));
        for (std::size_t other = 0; other < schedule_.num_others(item); ++other) {
            const Parts parts = entries.entrances.of(entries.begins[item] + other);
            cut(parts);
            entrance_at.emplace_back(parts);
        }
        std::sort(cuts.begin(), cuts.end());
        cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
        Cursor relay_at(between.relays.of(item)), sender_at(between.senders.of(item)), inside_at(inside.of(item));
        std::int64_t begin = 0;
        for (std::int64_t end : cuts) {
            roles.inside_relay = inside_at.at(begin);
            roles.sender = sender_at.at(begin);
            roles.relay = relay_at.at(begin);
            roles.entrances.clear();
            for (Cursor& each : entrance_at) roles.entrances.push_back(each.at(begin));
            add_cell(item, begin, end, roles);
            begin = end;
        }
    }
}

void Trees::add_cell(std::size_t item, std::int64_t begin, std::int64_t end, const Roles& roles) {
    const std::int32_t owner = schedule_.owners[item], home = schedule_.homes[item];
    const auto at_home = schedule_.at_home(item);
    const std::size_t first_hop = hops_.size();
    std::int32_t carrier = roles.inside_relay;
    spread(0, owner, at_home, carrier);
    bool is_relayed = carrier != owner;
    std::int64_t carried = (end - begin) * (static_cast<std::int64_t>(at_home.size()) - 1 - is_relayed);
    const bool crosses = !roles.entrances.empty();
    if (crosses) {
        const std::int32_t relay = roles.relay;
        const bool is_away = relay != nobody && schedule_.node_of(relay) != home;
        const std::int32_t carrier_out = relay == nobody || is_away ? roles.sender : relay;
        // If others than the owner send it out, that sets the pace for what they get.
        if (roles.sender == owner && carrier_out == owner && hops_.size() > first_hop)
            add_branch(carrier, carried, is_relayed, false);
        const std::int32_t inside_relay = carrier;
        const auto depth_of = [&](std::int32_t rank) {
            return rank == owner ? 0 : rank == inside_relay || inside_relay == owner ? 1 : 2;
        };
        const std::int32_t sender_depth = depth_of(roles.sender);
        const auto entrance = std::find_if(roles.entrances.begin(), roles.entrances.end(), [&](std::int32_t each) {
            return !is_away || schedule_.node_of(each) == schedule_.node_of(relay);
        });
        const std::int32_t first = *entrance;
        carrier = is_away ? relay : carrier_out;
        // The relay gets it where it enters its node.
        const std::int32_t depth = is_away ? sender_depth + 1 + (first != relay) : depth_of(carrier);
        is_relayed = carrier != owner;
        enter(item, sender_depth, roles.sender, first);
        for (std::int32_t entrance : roles.entrances)
            if (entrance != first) enter(item, depth, carrier, entrance);
        const auto num_others = static_cast<std::int64_t>(roles.entrances.size());
        carried = (end - begin) * std::max<std::int64_t>(num_others - 1, 1);
    }
    if (hops_.size() > (branches_.empty() ? 0 : branches_.back().end_hop))
        add_branch(carrier, carried, is_relayed, crosses);
    cells_.push_back({item, begin, end, branches_.size(), hops_.size()});
}

// Adds the hops into another node, and those inside it.
void Trees::enter(std::size_t item, std::int32_t depth, std::int32_t src, std::int32_t entrance) {
    hops_.push_back({depth, src, entrance});
    spread(depth + 1, entrance, schedule_.members(item, schedule_.node_of(entrance)), entrance);
}

// Adds the hops from the source to all of the ranks, through the relay.
void Trees::spread(std::int32_t depth, std::int32_t source, std::span<const std::int32_t> ranks, std::int32_t relay) {
    if (relay != source) hops_.push_back({depth++, source, relay});
    for (std::int32_t rank : ranks)
        if (rank != source && rank != relay) hops_.push_back({depth, relay, rank});
}

void Trees::add_branch(std::int32_t carrier, std::int64_t carried_bytes, bool is_relayed, bool crosses) {
    branches_.push_back({hops_.size(), 4 * at(carrier) + 2 * is_relayed + crosses, carried_bytes});
}

void Trees::Forwards::begin_cell(std::size_t first_hop, std::size_t end_hop) {
    ++cell_;
    if (!trees_.mirrored_) return;
    for (std::size_t hop = first_hop; hop < end_hop; ++hop)
        if (trees_.hops_[hop].depth) last_cell_[at(trees_.hops_[hop].src)] = cell_;
}

void Trees::measure() {
    const Links& links = schedule_.links;
    Loads loads(links);
    Forwards forwards(*this);
    std::int64_t depth = 0;
    std::size_t hop = 0;
    for (const Cell& cell : cells_) {
        forwards.begin_cell(hop, cell.end_hop);
        const std::int64_t whole = cell.end - cell.begin;
        const std::int64_t partial = Schedule::scaled(whole, schedule_.first_bytes[cell.item], schedule_.sizes[cell.item]);
        for (; hop < cell.end_hop; ++hop) {
            const auto& [hop_depth, src, dst] = hops_[hop];
            const std::int64_t bytes = forwards.has(dst) ? partial : whole;
            const bool crosses = links.cross(src, dst);
            loads.send(src, crosses, bytes);
            loads.receive(dst, crosses, bytes);
            depth = std::max(depth, std::int64_t{hop_depth} + 1);
        }
    }
    level_ = loads.busiest();
    const std::int64_t latency = std::max(links.up_latency, links.out_latency);
    const auto most_holders = static_cast<std::int64_t>(schedule_.holdings.most);
    num_pieces_ = choose_pieces(level_, depth, most_holders ? most_holders - 1 : 1, latency);
    // Ranks may run ahead by an eighth of the schedule (lead), and by as much as is on its way.
    const Ticks whole = level_ + Ticks{2} * latency * slots / lead;
    num_slots_ = level_ ? std::max<std::int32_t>(static_cast<std::int32_t>(slots * level_ / whole), 1) : 1;
    if (level_) latency_slots_ = static_cast<std::int64_t>(std::min(Ticks{latency} * num_slots_ / level_, Ticks{lead / 2}));
    expected_ = level_ + Ticks{depth} * latency;
    if (depth > 1) expected_ += (depth - 1) * level_ / num_pieces_;
}

// How many slots its carrier is busy with a branch.
std::int64_t Trees::slots_of(const Branch& branch) const {
    const std::size_t carrier = branch.line / 4, crosses = branch.line % 2;
    const std::int64_t cost = (crosses ? schedule_.links.out : schedule_.links.up)[carrier];
    const Ticks slots_taken = divide_up(Ticks{num_slots_} * branch.carried_bytes * cost, std::max(level_, Ticks{1}));
    return static_cast<std::int64_t>(std::max(slots_taken, Ticks{1}));
}

// A rank's line of work takes turns over all slots, each as long as its share of the line.
Table Trees::table() const {
    struct Line {
        std::int64_t total = 0, position = 0;
    };
    struct Turn {
        std::int64_t begin, span;
    };
    std::vector<Line> lines(4 * schedule_.links.world_size());
    for (const Branch& branch : branches_) lines[branch.line].total += branch.carried_bytes;
    Table table{std::make_unique_for_overwrite<Transfer[]>(hops_.size()), hops_.size()};
    Forwards forwards(*this);
    std::vector<Turn> turns;
    std::int32_t last = 0;
    std::size_t branch = 0, hop = 0;
    for (const Cell& cell : cells_) {
        turns.clear();
        std::int64_t longest = 0;
        for (std::size_t each = branch; each < cell.end_branch; ++each) {
            Line& line = lines[branches_[each].line];
            const Ticks begin = Ticks{num_slots_} * line.position / std::max<std::int64_t>(line.total, 1);
            line.position += branches_[each].carried_bytes;
            turns.push_back({static_cast<std::int64_t>(begin), slots_of(branches_[each])});
            longest = std::max(longest, turns.back().span);
        }
        // All branches are cut alike: who forwards in one what came by another does so piece by piece.
        const std::int64_t most = schedule_.divisible ? (cell.end - cell.begin) / least_piece_bytes : 1;
        const std::int64_t fitting = (longest * num_pieces_ + num_slots_ - 1) / num_slots_;
        const std::int64_t pieces = std::max<std::int64_t>(std::min(fitting, most), 1);
        forwards.begin_cell(hop, cell.end_hop);
        const auto chunk = static_cast<std::int32_t>(schedule_.holdings.chunks[cell.item]);
        for (const Turn& turn : turns) {
            // Until those who forward a piece have it.
            const std::int64_t lag = (turn.span + pieces - 1) / pieces + latency_slots_;
            for (; hop < branches_[branch].end_hop; ++hop) {
                const auto& [depth, src, dst] = hops_[hop];
                // Pieces of all cells of a line take turns, so that nobody gets much of one and nothing of others.
                const auto stage = static_cast<std::int32_t>(turn.begin / pieces + depth * lag);
                const auto end = static_cast<std::int32_t>(stage + num_slots_ * (pieces - 1) / pieces + lag);
                last = std::max(last, end);
                table.rows[hop] = {mirrored_ ? -end : stage,
                                   num_slots_,
                                   mirrored_ ? dst : src,
                                   mirrored_ ? src : dst,
                                   chunk,
                                   static_cast<std::int32_t>(pieces),
                                   cell.begin,
                                   cell.end,
                                   forwards.has(dst),
                                   {}};
            }
            ++branch;
        }
    }
    if (mirrored_)  // the same schedule with time and arrows turned round
        for (std::size_t row = 0; row < table.size; ++row) table.rows[row].stage += last;
    return table;
}

}  // namespace sparsecoll::plan
