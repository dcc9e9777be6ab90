// As sparsecoll/balance/divide.py, which says how and why.
#include <algorithm>
#include <limits>
#include <numeric>

#include "balance.hpp"

namespace sparsecoll::balance {
namespace {

using Amount = std::int64_t;

constexpr std::size_t nowhere = std::numeric_limits<std::size_t>::max();
constexpr Amount endless = std::numeric_limits<Amount>::max();
constexpr int unreached = std::numeric_limits<int>::max();

// Assignments of an expert to a holder, or to all holders of a node; `local` came from there.
struct Account {
    Amount amount, local;
};

struct Seat : Account {
    std::size_t pool, rank;
};

// Its seats are those from `begin` on up to the next pool's.
struct Pool : Account {
    std::size_t hot, begin;
    Amount stray;  // assignments that are nobody's own
};

struct Step {
    std::size_t came_from;
    Amount limit;
    Account* what;
    int sign;
};

// Places of a search are ranks, then pools, then experts.
class Division {
  public:
    Division(const Layer& layer, std::span<const std::int32_t> node_of);

    Amount least_level() const { return least_level_; }
    Amount reach(Amount level);
    std::vector<Amount> quotas() const;

  private:
    void seat_holders(std::size_t hot, std::span<const std::size_t> by_node);
    void start();
    std::size_t search(Amount level);
    void give_up(std::size_t place, std::size_t to, Account& what);
    void take_on(std::size_t place, std::size_t to, Account& what);
    void relax(std::size_t to, int cost, const Step& step);
    void wait(std::size_t place);
    void move_along(std::size_t end, Amount level);

    std::span<Seat> seats_of_pool(std::size_t pool) {
        const std::size_t end = pool + 1 < pools_.size() ? pools_[pool + 1].begin : seats_.size();
        return std::span(seats_).subspan(pools_[pool].begin, end - pools_[pool].begin);
    }

    const Layer& layer_;
    std::span<const std::int32_t> node_of_;
    std::vector<Amount> load_, fixed_, away_;  // away_: of hot experts, what no node with holders asked for
    std::vector<std::size_t> hot_, first_pool_;
    Amount least_level_;
    std::vector<Pool> pools_, first_pools_;
    std::vector<Seat> seats_, first_seats_;
    std::vector<std::vector<std::size_t>> seats_of_rank_;
    std::vector<std::size_t> by_stray_;
    // Of the level at hand.
    std::vector<Amount> computed_;
    // Of the last search.
    std::vector<int> cost_;
    std::vector<Step> step_;
    std::vector<std::size_t> waiting_;  // a ring, in which each place is at most once
    std::vector<char> is_waiting_;
    std::size_t first_waiting_ = 0, num_waiting_ = 0;
};

Division::Division(const Layer& layer, std::span<const std::int32_t> node_of)
    : layer_(layer),
      node_of_(node_of),
      load_(layer.num_experts()),
      fixed_(layer.world_size),
      seats_of_rank_(layer.world_size) {
    for (std::size_t rank = 0; rank < layer.world_size; ++rank)
        for (std::size_t expert = 0; expert < load_.size(); ++expert) load_[expert] += layer.load(rank, expert);
    for (std::size_t expert = 0; expert < load_.size(); ++expert) {
        const bool* row = layer.holders + expert * layer.world_size;
        if (std::count(row, row + layer.world_size, true) > 1) {
            hot_.push_back(expert);
        } else {
            fixed_[static_cast<std::size_t>(layer.owners[expert])] += load_[expert];
        }
    }
    const auto world_size = static_cast<Amount>(layer.world_size);
    const Amount total = std::accumulate(load_.begin(), load_.end(), Amount{0});
    least_level_ = std::max((total + world_size - 1) / world_size, *std::max_element(fixed_.begin(), fixed_.end()));

    std::vector<std::size_t> by_node(layer.world_size);
    std::iota(by_node.begin(), by_node.end(), std::size_t{0});
    std::stable_sort(by_node.begin(), by_node.end(),
                     [&](std::size_t a, std::size_t b) { return node_of[a] < node_of[b]; });
    for (std::size_t hot = 0; hot < hot_.size(); ++hot) seat_holders(hot, by_node);
    first_pool_.push_back(pools_.size());
    by_stray_.resize(pools_.size());
    std::iota(by_stray_.begin(), by_stray_.end(), std::size_t{0});
    std::stable_sort(by_stray_.begin(), by_stray_.end(),
                     [&](std::size_t a, std::size_t b) { return pools_[a].stray > pools_[b].stray; });
    first_pools_ = pools_;
    first_seats_ = seats_;

    const std::size_t num_places = layer.world_size + pools_.size() + hot_.size();
    cost_.resize(num_places);
    step_.resize(num_places);
    waiting_.resize(num_places);
    is_waiting_.resize(num_places);
}

void Division::seat_holders(std::size_t hot, std::span<const std::size_t> by_node) {
    const std::size_t expert = hot_[hot];
    first_pool_.push_back(pools_.size());
    away_.push_back(load_[expert]);
    for (std::size_t begin = 0, end; begin < by_node.size(); begin = end) {
        Pool pool{{0, 0}, hot, seats_.size(), 0};
        for (end = begin; end < by_node.size() && node_of_[by_node[end]] == node_of_[by_node[begin]]; ++end) {
            const std::size_t rank = by_node[end];
            const Amount asked = layer_.load(rank, expert);
            pool.amount += asked;
            if (layer_.holds(rank, expert)) {
                seats_of_rank_[rank].push_back(seats_.size());
                seats_.push_back({{asked, asked}, pools_.size(), rank});
            } else {
                pool.stray += asked;
            }
        }
        if (pool.begin == seats_.size()) continue;
        pool.local = pool.amount;
        away_.back() -= pool.amount;
        pools_.push_back(pool);
    }
}

// Every assignment at a nearest holder: those of a pool that are nobody's own go to the least busy one.
void Division::start() {
    pools_ = first_pools_;
    seats_ = first_seats_;
    computed_ = fixed_;
    for (Seat& seat : seats_) {
        Pool& pool = pools_[seat.pool];
        if (static_cast<std::size_t>(layer_.owners[hot_[pool.hot]]) == seat.rank) {
            seat.amount += away_[pool.hot];
            pool.amount += away_[pool.hot];
        }
        computed_[seat.rank] += seat.amount;
    }
    for (std::size_t pool : by_stray_) {
        const auto owner = static_cast<std::size_t>(layer_.owners[hot_[pools_[pool].hot]]);
        Seat* best = nullptr;
        for (Seat& seat : seats_of_pool(pool)) {
            const bool is_better = !best || computed_[seat.rank] < computed_[best->rank] ||
                                   (computed_[seat.rank] == computed_[best->rank] && seat.rank == owner);
            if (is_better) best = &seat;
        }
        best->amount += pools_[pool].stray;
        computed_[best->rank] += pools_[pool].stray;
    }
}

// Starts anew and brings all ranks down to a level; a higher one that is needed if that cannot be, otherwise the same.
Amount Division::reach(Amount level) {
    start();
    const auto is_above = [&](Amount computed) { return computed > level; };
    while (std::any_of(computed_.begin(), computed_.end(), is_above)) {
        const std::size_t end = search(level);
        if (end == nowhere) {
            Amount sum = 0, count = 0;
            for (std::size_t rank = 0; rank < layer_.world_size; ++rank) {
                if (cost_[rank] == unreached) continue;
                sum += computed_[rank];
                ++count;
            }
            return (sum + count - 1) / count;
        }
        move_along(end, level);
    }
    return level;
}

void Division::wait(std::size_t place) {
    if (is_waiting_[place]) return;
    is_waiting_[place] = 1;
    std::size_t last = first_waiting_ + num_waiting_++;
    if (last >= waiting_.size()) last -= waiting_.size();
    waiting_[last] = place;
}

// Finds cheapest ways from ranks above the level; the nearest rank below it, or nowhere.
std::size_t Division::search(Amount level) {
    std::fill(cost_.begin(), cost_.end(), unreached);
    for (std::size_t rank = 0; rank < layer_.world_size; ++rank) {
        if (computed_[rank] <= level) continue;
        cost_[rank] = 0;
        step_[rank].came_from = nowhere;
        wait(rank);
    }
    const std::size_t first_pool = layer_.world_size, first_hot = first_pool + pools_.size();
    while (num_waiting_) {
        const std::size_t place = waiting_[first_waiting_];
        if (++first_waiting_ == waiting_.size()) first_waiting_ = 0;
        --num_waiting_;
        is_waiting_[place] = 0;
        if (place < first_pool) {
            for (std::size_t seat : seats_of_rank_[place])
                if (seats_[seat].amount) give_up(place, first_pool + seats_[seat].pool, seats_[seat]);
        } else if (place < first_hot) {
            Pool& pool = pools_[place - first_pool];
            for (Seat& seat : seats_of_pool(place - first_pool)) take_on(place, seat.rank, seat);
            if (first_pool_[pool.hot + 1] - first_pool_[pool.hot] > 1 && pool.amount)
                give_up(place, first_hot + pool.hot, pool);
        } else {
            const std::size_t hot = place - first_hot;
            for (std::size_t pool = first_pool_[hot]; pool < first_pool_[hot + 1]; ++pool)
                take_on(place, first_pool + pool, pools_[pool]);
        }
    }
    std::size_t best = nowhere;
    for (std::size_t rank = 0; rank < layer_.world_size; ++rank) {
        if (cost_[rank] == unreached || computed_[rank] >= level) continue;
        if (best == nowhere || cost_[rank] < cost_[best]) best = rank;
    }
    return best;
}

// Those who are not at home here go first, and are no farther away elsewhere.
void Division::give_up(std::size_t place, std::size_t to, Account& what) {
    const Amount strangers = what.amount - what.local;
    if (strangers > 0) {
        relax(to, cost_[place] - 1, {place, strangers, &what, -1});
    } else {
        relax(to, cost_[place], {place, what.amount, &what, -1});
    }
}

void Division::take_on(std::size_t place, std::size_t to, Account& what) {
    const Amount missing = what.local - what.amount;
    if (missing > 0) {
        relax(to, cost_[place], {place, missing, &what, 1});
    } else {
        relax(to, cost_[place] + 1, {place, endless, &what, 1});
    }
}

void Division::relax(std::size_t to, int cost, const Step& step) {
    if (cost >= cost_[to]) return;
    cost_[to] = cost;
    step_[to] = step;
    wait(to);
}

void Division::move_along(std::size_t end, Amount level) {
    Amount amount = level - computed_[end];
    std::size_t begin = end;
    for (; step_[begin].came_from != nowhere; begin = step_[begin].came_from) amount = std::min(amount, step_[begin].limit);
    amount = std::min(amount, computed_[begin] - level);
    for (std::size_t place = end; place != begin; place = step_[place].came_from)
        step_[place].what->amount += step_[place].sign * amount;
    computed_[begin] -= amount;
    computed_[end] += amount;
}

std::vector<Amount> Division::quotas() const {
    std::vector<Amount> quotas(load_.size() * layer_.world_size);
    for (std::size_t expert = 0; expert < load_.size(); ++expert)
        quotas[expert * layer_.world_size + static_cast<std::size_t>(layer_.owners[expert])] = load_[expert];
    for (std::size_t expert : hot_)
        quotas[expert * layer_.world_size + static_cast<std::size_t>(layer_.owners[expert])] = 0;
    for (const Seat& seat : seats_)
        quotas[hot_[pools_[seat.pool].hot] * layer_.world_size + seat.rank] = seat.amount;
    return quotas;
}

}  // namespace

std::vector<std::int64_t> divide_loads(const Layer& layer, std::span<const std::int32_t> node_of) {
    Division division(layer, node_of);
    Amount level = division.least_level();
    for (Amount higher; (higher = division.reach(level)) != level;) level = higher;
    return division.quotas();
}

}  // namespace sparsecoll::balance
