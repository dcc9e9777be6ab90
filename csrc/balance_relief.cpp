// As sparsecoll/balance/relief.py, which says how and why.
#include <algorithm>
#include <cstddef>
#include <numeric>
#include <optional>
#include <utility>

#include "balance.hpp"

namespace sparsecoll::balance {
namespace {

constexpr int near_mean_shift = 7;

using Moves = std::vector<Move>;

// What does not depend on the level.
class Relieving {
  public:
    Relieving(const Layer& layer, std::int64_t min_tokens);

    bool is_near_mean(std::int64_t level) const { return level <= near_mean_; }
    std::int64_t at_owner_level() const { return at_owner_[busiest_.front()]; }
    std::optional<Moves> least_level(std::int64_t slots, std::int64_t above);
    Relief summary(Moves&& moves) const;

  private:
    std::span<const std::size_t> owned(std::size_t rank);
    bool find_moves(std::int64_t level, std::int64_t slots);
    std::size_t taker(std::int64_t level, std::int64_t wanted, std::int64_t least, bool is_copy) const;

    const Layer& layer_;
    std::int64_t min_tokens_;
    std::vector<std::int64_t> load_, asked_, at_owner_;
    std::vector<std::size_t> by_owner_, begins_, busiest_;
    bool has_replicas_;
    std::vector<char> is_sorted_;  // of ranks, whether their experts in by_owner_ are
    std::int64_t step_, near_mean_;
    // Of the last try.
    std::vector<std::int64_t> computed_, free_;
    std::vector<char> holds_;  // the expert at hand, before any replica is made of it
    std::vector<char> takes_;  // it, or will hold it
    Moves moves_;
};

Relieving::Relieving(const Layer& layer, std::int64_t min_tokens)
    : layer_(layer),
      min_tokens_(min_tokens),
      load_(layer.num_experts()),
      asked_(layer.world_size),
      at_owner_(layer.world_size),
      by_owner_(layer.num_experts()),
      begins_(layer.world_size + 1),
      busiest_(layer.world_size),
      has_replicas_(std::count(layer.holders, layer.holders + load_.size() * layer.world_size, true) >
                    static_cast<std::ptrdiff_t>(load_.size())),
      is_sorted_(layer.world_size) {
    for (std::size_t rank = 0; rank < layer.world_size; ++rank) {
        const std::int64_t* row = layer.loads.data() + rank * load_.size();
        std::int64_t *sum = load_.data(), asked = 0;
        for (std::size_t expert = 0; expert < load_.size(); ++expert) {
            sum[expert] += row[expert];
            asked += row[expert];
        }
        asked_[rank] = asked;
    }
    for (std::size_t expert = 0; expert < load_.size(); ++expert) {
        const auto owner = static_cast<std::size_t>(layer.owners[expert]);
        at_owner_[owner] += load_[expert];
        ++begins_[owner + 1];
    }
    std::partial_sum(begins_.begin(), begins_.end(), begins_.begin());
    auto next = begins_;
    for (std::size_t expert = 0; expert < load_.size(); ++expert)
        by_owner_[next[static_cast<std::size_t>(layer.owners[expert])]++] = expert;
    std::iota(busiest_.begin(), busiest_.end(), std::size_t{0});
    std::stable_sort(busiest_.begin(), busiest_.end(),
                     [&](std::size_t a, std::size_t b) { return at_owner_[a] > at_owner_[b]; });
    const auto world_size = static_cast<std::int64_t>(layer.world_size);
    const std::int64_t total = std::accumulate(load_.begin(), load_.end(), std::int64_t{0});
    const std::int64_t mean = (total + world_size - 1) / world_size;
    step_ = std::max<std::int64_t>(1, mean >> near_mean_shift);
    near_mean_ = mean + (mean >> near_mean_shift);
}

// A rank's experts, the busiest first; few ranks are asked for theirs.
std::span<const std::size_t> Relieving::owned(std::size_t rank) {
    const auto experts = std::span(by_owner_).subspan(begins_[rank], begins_[rank + 1] - begins_[rank]);
    if (!is_sorted_[rank])
        std::stable_sort(experts.begin(), experts.end(),
                         [&](std::size_t a, std::size_t b) { return load_[a] > load_[b]; });
    is_sorted_[rank] = 1;
    return experts;
}

// The moves of the least level below `above`, to a step.
std::optional<Moves> Relieving::least_level(std::int64_t slots, std::int64_t above) {
    if (is_near_mean(above) || !(slots || has_replicas_)) return std::nullopt;
    if (find_moves(near_mean_, slots)) return std::move(moves_);
    std::optional<Moves> found;
    std::int64_t below = near_mean_, stride = step_;
    while (above - below > step_) {
        std::int64_t middle = below + (above - below) / 2;
        if (!found) {
            // It is mostly near the mean: strides double from there until one is enough.
            middle = std::min(middle, below + stride);
            stride *= 2;
        }
        if (find_moves(middle, slots)) {
            above = middle;
            found = std::move(moves_);
        } else {
            below = middle;
        }
    }
    return found;
}

// Fills moves_ with those after which no rank is above the level.
bool Relieving::find_moves(std::int64_t level, std::int64_t slots) {
    computed_ = at_owner_;
    free_.assign(layer_.world_size, slots);
    moves_.clear();
    for (std::size_t rank : busiest_) {
        std::int64_t excess = computed_[rank] - level;
        if (excess <= 0) continue;
        for (std::size_t expert : owned(rank)) {
            if (excess <= 0) break;
            const bool* row = layer_.holders + expert * layer_.world_size;
            holds_.assign(row, row + layer_.world_size);
            takes_ = holds_;
            std::int64_t left = load_[expert];
            for (const bool is_copy : {false, true}) {
                const std::int64_t least = is_copy ? min_tokens_ : 1;
                while (excess > 0 && left >= least) {
                    // More than the excess where that is too little to be worth a replica.
                    const std::int64_t wanted = std::min(std::max(excess, least), left);
                    const std::size_t to = taker(level, wanted, least, is_copy);
                    if (to == layer_.world_size) break;
                    const std::int64_t amount = std::min(wanted, level - computed_[to]);
                    moves_.push_back({static_cast<std::int64_t>(expert), static_cast<std::int64_t>(to), amount});
                    takes_[to] = 1;
                    free_[to] -= is_copy;
                    computed_[to] += amount;
                    computed_[rank] -= amount;
                    excess -= amount;
                    left -= amount;
                }
            }
        }
        if (excess > 0) return false;
    }
    return true;
}

// The rank with the tightest room for all that is wanted, otherwise with the most, of at least `least`; the lowest of
// equals; world_size if there is none.
std::size_t Relieving::taker(std::int64_t level, std::int64_t wanted, std::int64_t least, bool is_copy) const {
    std::size_t best = layer_.world_size;
    std::int64_t best_room = least - 1;
    for (std::size_t rank = 0; rank < layer_.world_size; ++rank) {
        const std::int64_t room = level - computed_[rank];
        if (room < least) continue;
        if (is_copy ? takes_[rank] || !free_[rank] : !holds_[rank]) continue;
        if (room < wanted ? room > best_room : best_room < wanted || room < best_room) {
            best = rank;
            best_room = room;
        }
    }
    return best;
}

Relief Relieving::summary(Moves&& moves) const {
    std::vector<std::int64_t> computed = at_owner_, left = load_;
    std::vector<std::int64_t> received(layer_.world_size), sent(layer_.world_size), stays(layer_.world_size);
    std::vector<char> is_copied(load_.size());
    for (const Move& move : moves) {
        const auto expert = static_cast<std::size_t>(move.expert), rank = static_cast<std::size_t>(move.rank);
        const auto owner = static_cast<std::size_t>(layer_.owners[expert]);
        computed[owner] -= move.amount;
        computed[rank] += move.amount;
        left[expert] -= move.amount;
        stays[rank] += std::min(move.amount, layer_.load(rank, expert));
        if (!layer_.holds(rank, expert)) {
            ++received[rank];
            sent[owner] += !is_copied[expert];
            is_copied[expert] = 1;
        }
    }
    for (std::size_t expert = 0; expert < load_.size(); ++expert) {
        const auto owner = static_cast<std::size_t>(layer_.owners[expert]);
        stays[owner] += std::min(left[expert], layer_.load(owner, expert));
    }
    Relief relief{0, 0, 0, std::move(moves)};
    for (std::size_t rank = 0; rank < layer_.world_size; ++rank) {
        relief.level = std::max(relief.level, computed[rank]);
        relief.traffic = std::max(relief.traffic, std::max(computed[rank], asked_[rank]) - stays[rank]);
        relief.copies = std::max({relief.copies, received[rank], sent[rank]});
    }
    return relief;
}

}  // namespace

std::vector<Relief> relieve_ranks(const Layer& layer, std::int64_t most, std::int64_t min_tokens) {
    Relieving relieving(layer, min_tokens);
    std::vector<Relief> found;
    found.push_back(relieving.summary(relieving.least_level(0, relieving.at_owner_level()).value_or(Moves())));
    for (std::int64_t slots = 1; slots <= most && !relieving.is_near_mean(found.back().level);) {
        if (auto moves = relieving.least_level(slots, found.back().level))
            found.push_back(relieving.summary(std::move(*moves)));
        slots = slots == most ? most + 1 : std::min(2 * slots, most);
    }
    return found;
}

}  // namespace sparsecoll::balance
