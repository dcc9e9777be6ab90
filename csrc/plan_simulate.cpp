#include "plan_simulate.hpp"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace sparsecoll::plan {
namespace {

constexpr std::int32_t slots = 1024;
constexpr std::int32_t lead = slots / 8;

using Numbers = std::vector<std::int32_t>;

std::size_t at(std::int32_t index) { return static_cast<std::size_t>(index); }

// Numbers in groups; those of a group keep the order in which they come.
struct Groups {
    Numbers members;
    std::vector<std::size_t> begins;

    template <class GroupOf>
    Groups(std::size_t num_members, std::size_t num_groups, GroupOf group_of)
        : members(num_members), begins(num_groups + 1) {
        for (std::size_t member = 0; member < num_members; ++member) ++begins[group_of(member) + 1];
        std::partial_sum(begins.begin(), begins.end(), begins.begin());
        auto next = begins;
        for (std::size_t member = 0; member < num_members; ++member)
            members[next[group_of(member)]++] = static_cast<std::int32_t>(member);
    }
    std::span<const std::int32_t> of(std::size_t group) const {
        return std::span(members).subspan(begins[group], begins[group + 1] - begins[group]);
    }
};

// Sorts numbers by a key below num_keys, stably.
template <class KeyOf>
void sort_by(Numbers& numbers, std::size_t num_keys, KeyOf key_of) {
    std::vector<std::size_t> next(num_keys + 1);
    for (std::int32_t number : numbers) ++next[key_of(number) + 1];
    std::partial_sum(next.begin(), next.end(), next.begin());
    Numbers sorted(numbers.size());
    for (std::int32_t number : numbers) sorted[next[key_of(number)]++] = number;
    numbers.swap(sorted);
}

// All pieces of a table, in the order in which ranks prefer to send them.
struct Pieces {
    Numbers row, piece, stage;
    std::vector<std::size_t> begins;  // of each row, into number_of
    Numbers number_of;                // where the pieces of the rows, one row after the other, are in the order

    Pieces(std::span<const Transfer> table, std::size_t world_size) : begins(table.size() + 1) {
        for (std::size_t r = 0; r < table.size(); ++r) begins[r + 1] = begins[r] + at(table[r].pieces);
        const std::size_t count = begins.back();
        Numbers row_of(count), stage_of(count), order(count);
        std::int32_t first = 0, last = 0;
        for (std::size_t r = 0; r < table.size(); ++r) {
            const Transfer& each = table[r];
            for (std::int32_t p = 0; p < each.pieces; ++p) {
                const std::int64_t stage = each.stage + std::int64_t{p} * each.span / each.pieces;
                row_of[begins[r] + at(p)] = static_cast<std::int32_t>(r);
                stage_of[begins[r] + at(p)] = static_cast<std::int32_t>(stage);
                first = std::min(first, static_cast<std::int32_t>(stage));
                last = std::max(last, static_cast<std::int32_t>(stage));
            }
        }
        std::iota(order.begin(), order.end(), 0);
        sort_by(order, 2 * world_size, [&](std::int32_t index) {
            const Transfer& each = table[at(row_of[at(index)])];
            return at(each.dst) + (each.dst < each.src ? world_size : 0);
        });
        const auto range = static_cast<std::uint32_t>(last) - static_cast<std::uint32_t>(first);
        const auto due = [&](std::int32_t index) {
            return static_cast<std::uint32_t>(stage_of[at(index)]) - static_cast<std::uint32_t>(first);
        };
        constexpr std::uint32_t digit = 0xffff;
        sort_by(order, std::min(range, digit) + std::size_t{1}, [&](std::int32_t index) { return due(index) & digit; });
        if (range > digit) sort_by(order, (range >> 16) + 1, [&](std::int32_t index) { return due(index) >> 16; });
        row.reserve(count), piece.reserve(count), stage.reserve(count), number_of.resize(count);
        for (std::size_t number = 0; number < count; ++number) {
            const std::size_t index = at(order[number]);
            row.push_back(row_of[index]);
            piece.push_back(static_cast<std::int32_t>(index - begins[at(row_of[index])]));
            stage.push_back(stage_of[index]);
            number_of[index] = static_cast<std::int32_t>(number);
        }
    }

    std::size_t size() const { return row.size(); }
    std::size_t number(std::int32_t row_, std::int32_t piece_) const {
        return at(number_of[begins[at(row_)] + at(piece_)]);
    }
};

// For each row, how many rows bring its sender what it forwards (or sums), and the rows that wait for it.
struct Feeds {
    Numbers num_needs;
    std::vector<std::size_t> begins;
    Numbers rows;

    Feeds(std::span<const Transfer> table, bool gathers) : num_needs(table.size()), begins(table.size() + 1) {
        // Rows that wait, sorted by what they wait for.
        using Key = std::tuple<std::int32_t, std::int64_t, std::int32_t>;
        std::vector<std::pair<Key, std::int32_t>> waiting;
        for (std::size_t r = 0; r < table.size(); ++r)
            if (gathers || table[r].partial)
                waiting.push_back({{table[r].chunk, table[r].begin, table[r].src}, static_cast<std::int32_t>(r)});
        std::sort(waiting.begin(), waiting.end());
        const auto range_of = [&](const Transfer& each) {
            const Key key{each.chunk, each.begin, each.dst};
            const auto first = std::lower_bound(waiting.begin(), waiting.end(), std::pair{key, std::int32_t{-1}});
            auto last = first;
            while (last != waiting.end() && last->first == key) ++last;
            return std::pair{first, last};
        };
        for (std::size_t r = 0; r < table.size(); ++r) {
            const auto [first, last] = range_of(table[r]);
            for (auto each = first; each != last; ++each) {
                if (table[at(each->second)].pieces != table[r].pieces)
                    throw std::invalid_argument("simulate: expected a range to be forwarded in as many pieces");
                ++num_needs[at(each->second)];
                rows.push_back(each->second);
            }
            begins[r + 1] = rows.size();
        }
    }
    std::span<const std::int32_t> of(std::int32_t row) const {
        return std::span(rows).subspan(begins[at(row)], begins[at(row) + 1] - begins[at(row)]);
    }
};

// Groups of rows between the same two ranks.
std::pair<Numbers, std::size_t> pairs_of(std::span<const Transfer> table, std::size_t world_size) {
    Numbers order(table.size()), pair_of(table.size());
    std::iota(order.begin(), order.end(), 0);
    sort_by(order, world_size, [&](std::int32_t row) { return at(table[at(row)].dst); });
    sort_by(order, world_size, [&](std::int32_t row) { return at(table[at(row)].src); });
    std::int32_t pair = -1, src = -1, dst = -1;
    for (std::int32_t row : order) {
        const Transfer& each = table[at(row)];
        if (each.src != src || each.dst != dst) ++pair, src = each.src, dst = each.dst;
        pair_of[at(row)] = pair;
    }
    return {std::move(pair_of), static_cast<std::size_t>(pair + 1)};
}

// Time is Ticks, or 64 bits where that is enough. A port is 2 * rank inside a node, and one more to other nodes.
template <class Time>
class Play {
  public:
    Play(std::span<const Transfer> table, std::span<const std::int64_t> row_bytes, const Links& links, bool gathers)
        : table_(table),
          row_bytes_(row_bytes),
          links_(links),
          pieces_(table, links.world_size()),
          feeds_(table, gathers),
          pair_of_(pairs_of(table, links.world_size())),
          queues_(pieces_.size(), pair_of_.second, [&](std::size_t n) { return at(pair_of_.first[at(pieces_.row[n])]); }),
          expected_(pieces_.size(), 2 * links.world_size(), [&](std::size_t n) { return at(entrance(n)); }),
          next_(queues_.begins.begin(), queues_.begins.end() - 1),
          awaited_(expected_.begins.begin(), expected_.begins.end() - 1),
          heads_(2 * links.world_size()),
          refused_(2 * links.world_size()),
          leaving_(2 * links.world_size()),
          entering_(2 * links.world_size()),
          node_leaving_(links.node.size()),
          node_entering_(links.node.size()),
          missing_(pieces_.size()),
          has_arrived_(pieces_.size()) {
        for (std::size_t number = 0; number < pieces_.size(); ++number)
            missing_[number] = feeds_.num_needs[at(pieces_.row[number])];
        timeline_.sent.resize(pieces_.size());
        timeline_.arrived.resize(pieces_.size());
    }

    Timeline run() {
        for (std::size_t pair = 0; pair < pair_of_.second; ++pair) offer_head(pair, 0);
        while (!events_.empty()) {
            std::pop_heap(events_.begin(), events_.end(), std::greater<>());
            const auto [now, which] = events_.back();
            events_.pop_back();
            if (which < num_pieces()) {
                arrive(static_cast<std::size_t>(which), now);
            } else {
                const auto port = static_cast<std::size_t>(which - num_pieces());
                if (leaving_[port] <= now && !heads_[port].empty()) send(port, now);
            }
        }
        timeline_.row = std::move(pieces_.row);
        timeline_.piece = std::move(pieces_.piece);
        return std::move(timeline_);
    }

  private:
    // When, and a piece that arrives or, counted on from there, a port that is free: arrivals come first.
    using Event = std::pair<Time, std::uint32_t>;

    std::uint32_t num_pieces() const { return static_cast<std::uint32_t>(pieces_.size()); }
    const Transfer& transfer(std::size_t number) const { return table_[at(pieces_.row[number])]; }
    std::int32_t exit(std::size_t number) const {
        const Transfer& each = transfer(number);
        return 2 * each.src + links_.cross(each.src, each.dst);
    }
    std::int32_t entrance(std::size_t number) const {
        const Transfer& each = transfer(number);
        return 2 * each.dst + links_.cross(each.src, each.dst);
    }
    void push(Time when, std::size_t which) {
        events_.emplace_back(when, static_cast<std::uint32_t>(which));
        std::push_heap(events_.begin(), events_.end(), std::greater<>());
    }
    bool has_head(std::size_t pair) const { return next_[pair] < queues_.begins[pair + 1]; }
    std::size_t head(std::size_t pair) const { return at(queues_.members[next_[pair]]); }
    void offer_head(std::size_t pair, Time now) {
        if (has_head(pair) && !missing_[head(pair)]) offer(head(pair), now);
    }

    void offer(std::size_t number, Time now) {
        const std::size_t door = at(entrance(number));
        const std::size_t soonest = at(expected_.members[awaited_[door]]);
        if (pieces_.stage[number] > std::int64_t{pieces_.stage[soonest]} + lead) {
            refused_[door].push_back(static_cast<std::int32_t>(number));
            return;
        }
        const std::size_t port = at(exit(number));
        heads_[port].push_back(static_cast<std::int32_t>(number));
        std::push_heap(heads_[port].begin(), heads_[port].end(), std::greater<>());
        if (leaving_[port] <= now) push(now, pieces_.size() + port);
    }

    void arrive(std::size_t number, Time now) {
        has_arrived_[number] = 1;
        const std::size_t door = at(entrance(number));
        if (expected_.members[awaited_[door]] == static_cast<std::int32_t>(number)) {
            std::size_t& first = awaited_[door];
            while (first < expected_.begins[door + 1] && has_arrived_[at(expected_.members[first])]) ++first;
            again_.swap(refused_[door]);
            for (std::int32_t each : again_) offer(at(each), now);
            again_.clear();
        }
        for (std::int32_t row : feeds_.of(pieces_.row[number])) {
            const std::size_t fed = pieces_.number(row, pieces_.piece[number]);
            const std::size_t pair = at(pair_of_.first[at(row)]);
            if (!--missing_[fed] && has_head(pair) && head(pair) == fed) offer(fed, now);
        }
    }

    void send(std::size_t port, Time now) {
        std::pop_heap(heads_[port].begin(), heads_[port].end(), std::greater<>());
        const std::size_t number = at(heads_[port].back());
        heads_[port].pop_back();
        const Transfer& each = transfer(number);
        const Time bytes = bytes_of(number);
        const bool crosses = port % 2;
        const auto& cost = crosses ? links_.out : links_.up;
        const Time latency = crosses ? links_.out_latency : links_.up_latency;
        Time begin = now, end = now + bytes * cost[at(each.src)];
        timeline_.sent[number] = checked(now);
        leaving_[port] = end;
        push(end, pieces_.size() + port);
        const auto pass = [&](Time& free, std::int64_t ticks) {
            if (!ticks) return;  // nothing is shared, so nobody waits for anybody there
            if (!ticks) return;  // nothing is shared, so nobody waits for anybody there
            begin = std::max(begin, free);
            end = std::max(end, begin + bytes * ticks);
            free = end;
        };
        if (crosses) {
            const std::size_t home = at(links_.node_of[at(each.src)]), away = at(links_.node_of[at(each.dst)]);
            pass(node_leaving_[home], links_.node[home]);
            pass(node_entering_[away], links_.node[away]);
        }
        pass(entering_[2 * at(each.dst) + crosses], cost[at(each.dst)]);
        timeline_.arrived[number] = checked(end + latency);
        timeline_.finish = std::max(timeline_.finish, Ticks{end + latency});
        push(end + latency, number);
        const std::size_t pair = at(pair_of_.first[at(pieces_.row[number])]);
        ++next_[pair];
        offer_head(pair, now);
    }

    // Of a piece: what lies between this and the next k-th part of the row's bytes, rounded down.
    std::int64_t bytes_of(std::size_t number) const {
        const std::int64_t bytes = row_bytes_[at(pieces_.row[number])], count = transfer(number).pieces;
        const std::int64_t whole = bytes / count, rest = bytes % count, piece = pieces_.piece[number];
        return whole + (rest * (piece + 1) / count - rest * piece / count);
    }

    static std::int64_t checked(Time time) {
        if (Ticks{time} > INT64_MAX) throw std::overflow_error("simulate: expected times of at most 63 bits of ticks");
        return static_cast<std::int64_t>(time);
    }

    std::span<const Transfer> table_;
    std::span<const std::int64_t> row_bytes_;
    Links links_;
    Pieces pieces_;
    Feeds feeds_;
    std::pair<Numbers, std::size_t> pair_of_;  // of each row; and how many there are
    Groups queues_;                            // pieces between two ranks, in order
    Groups expected_;                          // pieces that come in at a port
    std::vector<std::size_t> next_;            // of each queue, its head
    std::vector<std::size_t> awaited_;         // of each port, the earliest piece that has not come
    std::vector<Numbers> heads_;               // of each port: heaps of what can go
    std::vector<Numbers> refused_;             // of each port: what may not come yet
    std::vector<Time> leaving_, entering_, node_leaving_, node_entering_;
    Numbers missing_;
    std::vector<char> has_arrived_;
    std::vector<Event> events_;  // a heap
    Numbers again_;
    Timeline timeline_;
};

void check(std::span<const Transfer> table, std::size_t world_size) {
    const auto is_rank = [&](std::int32_t rank) { return rank >= 0 && at(rank) < world_size; };
    for (const Transfer& each : table)
        if (!is_rank(each.src) || !is_rank(each.dst) || each.pieces < 1 || each.span < 0)
            throw std::invalid_argument("simulate: expected ranks of the links, and at least one piece of every row");
}

// Whether no sum of times can exceed 62 bits: all bytes over all four links on a way, one after the other.
bool is_short(std::span<const Transfer> table, std::span<const std::int64_t> row_bytes, const Links& links) {
    std::int64_t cost = 1;
    for (const auto& each : {links.up, links.out, links.node})
        for (std::int64_t ticks : each) cost = std::max(cost, ticks);
    Ticks bytes = 0, pieces = 0;
    for (std::size_t row = 0; row < table.size(); ++row) bytes += row_bytes[row], pieces += table[row].pieces;
    const Ticks total = bytes * 4 * cost + pieces * std::max(links.up_latency, links.out_latency);
    return total < Ticks{1} << 62;
}

}  // namespace

Timeline simulate(std::span<const Transfer> table, std::span<const std::int64_t> row_bytes, const Links& links,
                  bool gathers) {
    check(table, links.world_size());
    if (is_short(table, row_bytes, links)) return Play<std::int64_t>(table, row_bytes, links, gathers).run();
    return Play<Ticks>(table, row_bytes, links, gathers).run();
}

}  // namespace sparsecoll::plan
