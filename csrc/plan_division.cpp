#include "plan_division.hpp"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>

namespace sparsecoll::plan {
namespace {

constexpr int rate_bits = 40;
constexpr Amount endless = Amount{1} << 62;
constexpr std::int32_t nowhere = -1, unseen = -2;
constexpr int many_exchanges = 32;  // that pay for what makes each of them cheaper

std::size_t at(std::int32_t index) { return static_cast<std::size_t>(index); }

Ticks divide_up(Ticks amount, Ticks by) { return (amount + by - 1) / by; }

// Bins of every pool.
struct Pools {
    std::vector<std::int32_t> bins;
    std::vector<std::size_t> begins;

    Pools(std::span<const std::int32_t> pool_of, std::size_t num_pools) : bins(pool_of.size()), begins(num_pools + 1) {
        for (std::int32_t pool : pool_of) ++begins[at(pool) + 1];
        std::partial_sum(begins.begin(), begins.end(), begins.begin());
        auto next = begins;
        for (std::size_t bin = 0; bin < pool_of.size(); ++bin)
            bins[next[at(pool_of[bin])]++] = static_cast<std::int32_t>(bin);
    }
    std::span<const std::int32_t> of(std::int32_t pool) const {
        return std::span(bins).subspan(begins[at(pool)], begins[at(pool) + 1] - begins[at(pool)]);
    }
};

class Filling {
  public:
    Filling(const Work& work, const Bins& bins, Ticks floor);

    bool is_done() const { return left_.empty(); }
    bool exchange();
    void raise_level();
    Division result() const;

  private:
    // An item's share of a bin, and the item's next one.
    struct Done {
        std::int32_t bin;
        std::int32_t next;
        Amount amount;
    };

    void list_left();
    Ticks average() const;
    void set_level(Ticks level);
    Amount own_room(std::int32_t bin) const { return capacity_[at(bin)] - used_[at(bin)]; }
    Amount pool_room(std::int32_t pool) const {
        return bins_.pool_cost[at(pool)] ? pool_capacity_[at(pool)] - pool_used_[at(pool)] : endless;
    }
    Amount room(std::int32_t bin) const { return std::min(own_room(bin), pool_room(pool_of_[at(bin)])); }
    void fill(std::int32_t item);
    Amount& done(std::int32_t item, std::int32_t bin);
    void move(std::int32_t item, std::int32_t bin, Amount amount);
    void prepare_exchanges();
    void group_by_choice();
    bool visit(std::int32_t item);
    void move_along(std::int32_t end);

    Work work_;
    Bins bins_;
    std::vector<std::int32_t> pool_of_;
    std::vector<Amount> used_, pool_used_;
    std::vector<Amount> capacity_, pool_capacity_;  // that an account may have at this level
    Ticks level_ = 0;
    std::vector<Done> done_;
    std::vector<std::int32_t> first_done_;  // of each item, into done_
    std::vector<std::int32_t> left_;        // items, in their order
    std::vector<Amount> rest_;              // of each item
    std::vector<std::pair<Amount, std::int32_t>> roomy_;
    // Of exchanges: the items that have something on a bin, ascending; and how far the last search came.
    std::vector<std::vector<std::int32_t>> items_on_;
    std::vector<Pools> pools_;                       // one, once needed
    std::vector<std::int32_t> choice_of_;            // of items: equal numbers allow the same bins
    std::vector<char> is_seen_choice_;
    int num_exchanges_ = 0;
    std::vector<std::int32_t> came_from_, through_;  // of bins: an item; a bin of the same pool
    std::vector<std::int32_t> left_bin_;             // of items: the bin that it would leave; nowhere for what is left
    std::vector<std::int32_t> reached_items_, reached_bins_, reached_pools_;
    std::vector<char> is_reached_pool_;
};

Filling::Filling(const Work& work, const Bins& bins, Ticks floor)
    : work_(work),
      bins_(bins),
      pool_of_(bins.pool_of.begin(), bins.pool_of.end()),
      used_(bins.base.begin(), bins.base.end()),
      first_done_(work.amounts.size(), nowhere),
      rest_(work.amounts.begin(), work.amounts.end()) {
    static constexpr std::int64_t no_pool_cost[] = {0};
    if (pool_of_.empty()) pool_of_.assign(used_.size(), 0);
    if (bins_.pool_cost.empty()) bins_.pool_cost = no_pool_cost;
    pool_used_.assign(bins_.pool_cost.size(), 0);
    for (std::size_t bin = 0; bin < used_.size(); ++bin) pool_used_[at(pool_of_[bin])] += used_[bin];

    list_left();
    Ticks level = std::max(floor, average());
    for (std::size_t bin = 0; bin < used_.size(); ++bin) level = std::max(level, used_[bin] * bins.cost[bin]);
    for (std::size_t pool = 0; pool < pool_used_.size(); ++pool)
        level = std::max(level, pool_used_[pool] * bins_.pool_cost[pool]);
    set_level(level);

    done_.reserve(2 * left_.size() + 64);
    for (std::int32_t item : left_) fill(item);
    std::erase_if(left_, [&](std::int32_t item) { return !rest_[at(item)]; });
}

// Who has least choice goes first, and of those the largest.
void Filling::list_left() {
    struct Key {
        std::size_t choice;
        Amount amount;
        std::int32_t item;
    };
    std::vector<Key> keys;
    for (std::size_t item = 0; item < rest_.size(); ++item) {
        if (!rest_[item]) continue;
        const std::size_t choice = work_.allowed[item].size();
        if (!choice) throw std::invalid_argument("divide: expected a bin for every item with work");
        keys.push_back({choice, rest_[item], static_cast<std::int32_t>(item)});
    }
    std::sort(keys.begin(), keys.end(), [](const Key& a, const Key& b) {
        if (a.choice != b.choice) return a.choice < b.choice;
        return a.amount != b.amount ? a.amount > b.amount : a.item < b.item;
    });
    left_.reserve(keys.size());
    for (const Key& key : keys) left_.push_back(key.item);
}

// The level at which all bins that may do anything have room for everything.
Ticks Filling::average() const {
    if (left_.empty()) return 0;
    std::vector<char> is_allowed(used_.size());
    Amount total = 0;
    std::int64_t rates = 0;
    for (std::int32_t item : left_) {
        total += rest_[at(item)];
        for (std::int32_t bin : work_.allowed[at(item)]) is_allowed[at(bin)] = 1;
    }
    for (std::size_t bin = 0; bin < used_.size(); ++bin) {
        if (!is_allowed[bin]) continue;
        total += used_[bin];
        rates += (std::int64_t{1} << rate_bits) / bins_.cost[bin];
    }
    return rates ? divide_up(total << rate_bits, rates) : Ticks{0};
}

void Filling::set_level(Ticks level) {
    level_ = level;
    capacity_.resize(used_.size());
    for (std::size_t bin = 0; bin < used_.size(); ++bin) {
        const bool is_known = bin && bins_.cost[bin] == bins_.cost[bin - 1];
        capacity_[bin] = is_known ? capacity_[bin - 1] : level / bins_.cost[bin];
    }
    pool_capacity_.resize(pool_used_.size());
    for (std::size_t pool = 0; pool < pool_used_.size(); ++pool)
        pool_capacity_[pool] = bins_.pool_cost[pool] ? level / bins_.pool_cost[pool] : 0;
}

// Gives an item to its home, or to the roomiest bins and the rest to the tightest that holds it.
void Filling::fill(std::int32_t item) {
    Amount& rest = rest_[at(item)];
    if (!work_.home.empty() && work_.home[at(item)] >= 0 && room(work_.home[at(item)]) >= rest) {
        move(item, work_.home[at(item)], rest);
        rest = 0;
        return;
    }
    roomy_.clear();
    for (std::int32_t bin : work_.allowed[at(item)]) roomy_.emplace_back(room(bin), bin);
    std::sort(roomy_.begin(), roomy_.end(), [](const auto& a, const auto& b) {
        return a.first != b.first ? a.first > b.first : a.second < b.second;
    });
    for (std::size_t position = 0; position < roomy_.size(); ++position) {
        std::int32_t bin = roomy_[position].second;
        const Amount space = room(bin);  // less than when it was sorted, if one of its pool has taken something
        if (space >= rest) {
            for (std::size_t other = position + 1; other < roomy_.size(); ++other) {
                if (room(roomy_[other].second) < rest) break;
                bin = roomy_[other].second;
            }
            move(item, bin, rest);
            rest = 0;
            return;
        }
        if (space > 0) {
            move(item, bin, space);
            rest -= space;
        }
    }
}

Amount& Filling::done(std::int32_t item, std::int32_t bin) {
    std::int32_t* link = &first_done_[at(item)];
    while (*link != nowhere && done_[at(*link)].bin != bin) link = &done_[at(*link)].next;
    if (*link == nowhere) {
        const auto fresh = static_cast<std::int32_t>(done_.size());
        *link = fresh;  // before the vector grows, as the link may be in it
        done_.push_back({bin, nowhere, 0});
        return done_.back().amount;
    }
    return done_[at(*link)].amount;
}

void Filling::move(std::int32_t item, std::int32_t bin, Amount amount) {
    used_[at(bin)] += amount;
    pool_used_[at(pool_of_[at(bin)])] += amount;
    Amount& share = done(item, bin);
    const bool had_some = share != 0;
    share += amount;
    if (items_on_.empty() || had_some == (share != 0)) return;
    auto& items = items_on_[at(bin)];
    const auto place = std::lower_bound(items.begin(), items.end(), item);
    if (had_some) {
        items.erase(place);
    } else {
        items.insert(place, item);
    }
}

void Filling::prepare_exchanges() {
    items_on_.resize(used_.size());
    for (std::size_t item = 0; item < first_done_.size(); ++item)
        for (std::int32_t link = first_done_[item]; link != nowhere; link = done_[at(link)].next)
            if (done_[at(link)].amount) items_on_[at(done_[at(link)].bin)].push_back(static_cast<std::int32_t>(item));
    pools_.emplace_back(pool_of_, pool_used_.size());
    left_bin_.assign(rest_.size(), unseen);
    for (std::int32_t item : left_) left_bin_[at(item)] = nowhere;
    choice_of_.resize(rest_.size());
    std::iota(choice_of_.begin(), choice_of_.end(), 0);
    is_seen_choice_.resize(rest_.size());
}

// Two equal choices may get two numbers, at the cost of time alone.
void Filling::group_by_choice() {
    std::vector<std::pair<std::uint64_t, std::int32_t>> order;
    for (std::size_t item = 0; item < rest_.size(); ++item) {
        std::uint64_t hash = 0;
        for (std::int32_t bin : work_.allowed[item]) hash = (hash ^ static_cast<std::uint64_t>(bin)) * 0x9e3779b97f4a7c15;
        order.emplace_back(hash, static_cast<std::int32_t>(item));
    }
    std::sort(order.begin(), order.end());
    choice_of_.resize(rest_.size());
    std::int32_t choice = -1;
    std::span<const std::int32_t> last;
    for (const auto& [_, item] : order) {
        const auto allowed = work_.allowed[at(item)];
        if (choice < 0 || !std::ranges::equal(allowed, last)) ++choice;
        choice_of_[at(item)] = choice;
        last = allowed;
    }
    is_seen_choice_.resize(at(choice + 1));
}

// Finds one path from what is left over to a bin with room, along which each item moves some work on.
bool Filling::exchange() {
    if (items_on_.empty()) prepare_exchanges();
    if (++num_exchanges_ == many_exchanges) group_by_choice();
    came_from_.assign(used_.size(), nowhere);
    through_.assign(used_.size(), nowhere);
    std::fill(is_seen_choice_.begin(), is_seen_choice_.end(), 0);
    for (std::int32_t item : reached_items_) left_bin_[at(item)] = rest_[at(item)] ? nowhere : unseen;
    reached_items_.clear();
    reached_bins_.clear();
    reached_pools_.clear();
    is_reached_pool_.assign(pool_used_.size(), 0);
    for (std::int32_t item : left_)
        if (visit(item)) return true;
    // In the order in which they were reached: the items on the first bin, those on the second one, ...
    for (std::size_t turn = 0; turn < reached_bins_.size(); ++turn) {
        const std::int32_t bin = reached_bins_[turn];
        for (std::int32_t item : items_on_[at(bin)]) {
            if (left_bin_[at(item)] != unseen || is_seen_choice_[at(choice_of_[at(item)])]) continue;
            left_bin_[at(item)] = bin;
            reached_items_.push_back(item);
            if (visit(item)) return true;
        }
    }
    return false;
}

// Goes on to the bins that an item allows. A bin with room of its own whose pool is full is on the way to the other bins
// of its pool: one of those can move something elsewhere.
bool Filling::visit(std::int32_t item) {
    if (is_seen_choice_[at(choice_of_[at(item)])]) return false;  // another one has led to the same bins
    is_seen_choice_[at(choice_of_[at(item)])] = 1;
    const auto is_seen = [&](std::int32_t bin) { return came_from_[at(bin)] != nowhere || through_[at(bin)] != nowhere; };
    for (std::int32_t bin : work_.allowed[at(item)]) {
        if (is_seen(bin)) continue;
        came_from_[at(bin)] = item;
        reached_bins_.push_back(bin);
        const std::int32_t pool = pool_of_[at(bin)];
        if (own_room(bin) <= 0) continue;
        if (pool_room(pool) > 0) {
            move_along(bin);
            return true;
        }
        if (is_reached_pool_[at(pool)]) continue;
        is_reached_pool_[at(pool)] = 1;
        reached_pools_.push_back(pool);
        for (std::int32_t other : pools_.front().of(pool)) {
            if (is_seen(other)) continue;
            through_[at(other)] = bin;
            reached_bins_.push_back(other);
        }
    }
    return false;
}

void Filling::move_along(std::int32_t end) {
    std::vector<std::pair<std::int32_t, std::int32_t>> path;  // item and where to, from the end backwards
    Amount amount = room(end);
    for (std::int32_t bin = end;;) {
        const std::int32_t item = came_from_[at(bin)];
        path.emplace_back(item, bin);
        bin = left_bin_[at(item)];
        if (bin == nowhere) break;
        amount = std::min(amount, done(item, bin));
        if (through_[at(bin)] != nowhere) {
            bin = through_[at(bin)];
            amount = std::min(amount, own_room(bin));
        }
    }
    const std::int32_t first = path.back().first;
    amount = std::min(amount, rest_[at(first)]);
    for (const auto& [item, to] : path) {
        move(item, to, amount);
        if (left_bin_[at(item)] != nowhere) move(item, left_bin_[at(item)], -amount);
    }
    rest_[at(first)] -= amount;
    if (rest_[at(first)]) return;
    std::erase(left_, first);
    left_bin_[at(first)] = unseen;
}

// To where the accounts that the last search found full hold what is left over.
void Filling::raise_level() {
    Amount left = 0;
    for (std::int32_t item : left_) left += rest_[at(item)];
    std::int64_t rates = 0, least = INT64_MAX, most = 0;
    const auto count = [&](std::int64_t cost) {
        rates += (std::int64_t{1} << rate_bits) / cost;
        least = std::min(least, cost);
        most = std::max(most, cost);
    };
    for (std::int32_t pool : reached_pools_) count(bins_.pool_cost[at(pool)]);
    for (std::int32_t bin : reached_bins_)
        if (!is_reached_pool_[at(pool_of_[at(bin)])]) count(bins_.cost[at(bin)]);
    const Ticks rise = divide_up(left << rate_bits, rates);
    // At least a byte for each; and where costs differ, not one byte after the other.
    const Ticks step = most == least ? Ticks{most} : level_ >> 13;
    set_level(level_ + std::max({rise, step, Ticks{1}}));
}

Division Filling::result() const {
    Division division{level_, {}, {0}};
    division.shares.reserve(done_.size());
    division.begins.reserve(rest_.size() + 1);
    for (std::int32_t first : first_done_) {
        const auto begin = static_cast<std::ptrdiff_t>(division.shares.size());
        for (std::int32_t link = first; link != nowhere; link = done_[at(link)].next)
            if (done_[at(link)].amount) division.shares.push_back({done_[at(link)].bin, done_[at(link)].amount});
        std::sort(division.shares.begin() + begin, division.shares.end(),
                  [](const Share& a, const Share& b) { return a.bin < b.bin; });
        division.begins.push_back(division.shares.size());
    }
    return division;
}

}  // namespace

Division divide(const Work& work, const Bins& bins, Ticks floor) {
    Filling filling(work, bins, floor);
    while (!filling.is_done())
        if (!filling.exchange()) filling.raise_level();
    return filling.result();
}

}  // namespace sparsecoll::plan
