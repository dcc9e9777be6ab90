#include "plan_draft.hpp"

#include <algorithm>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "plan_holdings.hpp"
#include "plan_loads.hpp"
#include "plan_trees.hpp"

namespace sparsecoll::plan {
namespace {

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

Table table_of(std::size_t size) { return {std::make_unique_for_overwrite<Transfer[]>(size), size}; }

Transfer whole_chunk(std::int64_t stage, std::int64_t src, std::int64_t dst, std::int64_t chunk, std::int64_t bytes,
                     bool partial) {
    return {static_cast<std::int32_t>(stage),
            1,
            static_cast<std::int32_t>(src),
            static_cast<std::int32_t>(dst),
            static_cast<std::int32_t>(chunk),
            1,
            0,
            bytes,
            partial,
            {}};
}

// Until a message arrives: the longest of those that some message needs.
std::int64_t latency_of(const Links& links, bool some_stay, bool some_cross) {
    return std::max(some_stay ? links.up_latency : 0, some_cross ? links.out_latency : 0);
}

// Owner to every other holder, all in one stage; or back.
Ticks expect_direct(const Case& given, const Holdings& holdings) {
    Loads loads(given.links);
    bool some_stay = false, some_cross = false;
    for (std::size_t item = 0; item < holdings.size(); ++item) {
        const std::int32_t owner = given.owners[at(holdings.chunks[item])];
        const std::int64_t bytes = given.sizes[at(holdings.chunks[item])];
        std::int64_t num_staying = 0, num_crossing = 0;
        for (std::int32_t holder : holdings.of(item)) {
            if (holder == owner) continue;
            const bool crosses = given.links.cross(owner, holder);
            ++(crosses ? num_crossing : num_staying);
            loads.receive(holder, crosses, bytes);
        }
        loads.send(owner, false, num_staying * bytes);
        loads.send(owner, true, num_crossing * bytes);
        some_stay |= num_staying > 0;
        some_cross |= num_crossing > 0;
    }
    // Links carry as much in either direction, so the reduce-scatter takes as long.
    return loads.busiest() + latency_of(given.links, some_stay, some_cross);
}

Table make_direct(const Case& given, const Holdings& holdings) {
    // Ordered by how far the holder is from the owner, counted upwards, and then by chunk. Pairs are sorted first, as
    // rows are many times as large.
    struct Pair {
        std::uint32_t item;
        std::int32_t holder;
    };
    const auto world_size = static_cast<std::int32_t>(given.links.world_size());
    std::vector<std::size_t> next(at(world_size) + 1);
    const auto for_each = [&](auto use) {
        for (std::size_t item = 0; item < holdings.size(); ++item) {
            const std::int32_t owner = given.owners[at(holdings.chunks[item])];
            for (std::int32_t holder : holdings.of(item))
                if (holder != owner) use(item, holder, at(holder - owner + (holder < owner ? world_size : 0)));
        }
    };
    for_each([&](std::size_t, std::int32_t, std::size_t distance) { ++next[distance + 1]; });
    std::partial_sum(next.begin(), next.end(), next.begin());
    std::vector<Pair> pairs(next.back());
    for_each([&](std::size_t item, std::int32_t holder, std::size_t distance) {
        pairs[next[distance]++] = {static_cast<std::uint32_t>(item), holder};
    });
    Table table = table_of(pairs.size());
    Transfer* row = table.rows.get();
    for (const auto& [item, holder] : pairs) {
        const std::int64_t chunk = holdings.chunks[item];
        const std::int32_t owner = given.owners[at(chunk)];
        *row++ = whole_chunk(0, given.gathers ? owner : holder, given.gathers ? holder : owner, chunk,
                             given.sizes[at(chunk)], false);
    }
    return table;
}

// The ring: in stage k a rank passes on the whole shard of the rank k places before it, or a sum on its way there.
class Ring {
  public:
    explicit Ring(const Case& given) : given_(given), world_size_(given.links.world_size()) {}

    // Stops counting at the limit, if there is one.
    Ticks expect(std::optional<Ticks> limit) const;
    Table make() const;

  private:
    std::size_t num_stages() const { return world_size_ - 1; }
    bool sums(std::size_t stage) const { return stage > 0 && !given_.gathers; }
    std::size_t sender(std::size_t owner, std::size_t stage) const {
        return (owner + stage + !given_.gathers) % world_size_;
    }
    std::size_t receiver(std::size_t src) const { return src + 1 == world_size_ ? 0 : src + 1; }

    const Case& given_;
    std::size_t world_size_;
};

Ticks Ring::expect(std::optional<Ticks> limit) const {
    const Links& links = given_.links;
    std::vector<std::int64_t> shards(world_size_), sums_of_shards(world_size_);
    for (std::int64_t chunk : given_.chunks) {
        shards[at(given_.owners[at(chunk)])] += given_.sizes[at(chunk)];
        sums_of_shards[at(given_.owners[at(chunk)])] += given_.partial_sizes[at(chunk)];
    }
    std::vector<std::size_t> owners;  // that have something
    for (std::size_t rank = 0; rank < world_size_; ++rank)
        if (shards[rank]) owners.push_back(rank);
    if (owners.empty()) return 0;
    // Ticks that a byte takes from a rank to the next one, and whether it crosses between nodes.
    std::vector<std::int64_t> cost(world_size_);
    std::vector<char> crosses(world_size_);
    for (std::size_t src = 0; src < world_size_; ++src) {
        const std::size_t dst = receiver(src);
        crosses[src] = links.node_of[src] != links.node_of[dst];
        cost[src] = crosses[src] ? std::max(links.out[src], links.out[dst]) : std::max(links.up[src], links.up[dst]);
    }
    const bool nodes_limit = std::any_of(links.node.begin(), links.node.end(), [](std::int64_t ticks) { return ticks; });
    std::vector<std::int64_t> leaving(links.node.size()), entering(links.node.size());
    Ticks expected = 0;
    for (std::size_t stage = 0; stage < num_stages(); ++stage) {
        const auto& bytes = sums(stage) ? sums_of_shards : shards;
        Ticks busiest = 0;
        bool some_stay = false, some_cross = false;
        for (std::size_t owner : owners) {
            const std::size_t src = sender(owner, stage);
            busiest = std::max(busiest, Ticks{bytes[owner]} * cost[src]);
            (crosses[src] ? some_cross : some_stay) = true;
            if (!crosses[src] || !nodes_limit) continue;
            leaving[at(links.node_of[src])] += bytes[owner];
            entering[at(links.node_of[receiver(src)])] += bytes[owner];
        }
        if (nodes_limit) {
            for (std::size_t node = 0; node < leaving.size(); ++node)
                busiest = std::max(busiest, Ticks{std::max(leaving[node], entering[node])} * links.node[node]);
            std::fill(leaving.begin(), leaving.end(), 0);
            std::fill(entering.begin(), entering.end(), 0);
        }
        expected += busiest + latency_of(links, some_stay, some_cross);
        if (limit && expected >= *limit) break;
    }
    return expected;
}

Table Ring::make() const {
    Table table = table_of(num_stages() * given_.chunks.size());
    Transfer* row = table.rows.get();
    std::vector<std::size_t> senders;
    for (std::int64_t chunk : given_.chunks) senders.push_back(sender(at(given_.owners[at(chunk)]), 0));
    for (std::size_t stage = 0; stage < num_stages(); ++stage) {
        std::size_t* src = senders.data();
        for (std::int64_t chunk : given_.chunks) {
            const std::size_t dst = receiver(*src);
            *row++ = whole_chunk(static_cast<std::int64_t>(stage), static_cast<std::int64_t>(*src),
                                 static_cast<std::int64_t>(dst), chunk, given_.sizes[at(chunk)], sums(stage));
            *src++ = dst;
        }
    }
    return table;
}

Draft best(const Case& given) {
    const Holdings holdings(given);
    const std::size_t num_nodes = given.links.node.size();
    const bool has_levels = 1 < num_nodes && num_nodes < given.links.world_size();
    const Ticks direct = expect_direct(given, holdings);
    std::optional<Trees> trees;
    if (holdings.most > 2 && !(num_nodes == 1 && given.shared_memory)) trees.emplace(given, holdings, has_levels);
    const bool relays = trees && trees->expected() < direct;
    const Ticks least = relays ? trees->expected() : direct;
    const Ring ring(given);
    // The first of equals is taken: direct, then trees, then the ring.
    if (const Ticks dense = ring.expect(least); dense < least) return {"dense", dense, ring.make()};
    if (relays) return {has_levels ? "hierarchical" : "relay", least, trees->table()};
    return {"direct", direct, make_direct(given, holdings)};
}

}  // namespace

Draft draft(const Case& given, std::string_view algorithm) {
    if (algorithm == "auto") return best(given);
    if (algorithm == "dense") {
        const Ring ring(given);
        return {"dense", ring.expect(std::nullopt), ring.make()};
    }
    const Holdings holdings(given);
    if (algorithm == "direct") return {"direct", expect_direct(given, holdings), make_direct(given, holdings)};
    if (algorithm != "relay" && algorithm != "hierarchical")
        throw std::invalid_argument("draft: expected a known algorithm, got " + std::string(algorithm));
    const bool has_levels = algorithm == "hierarchical";
    Trees trees(given, holdings, has_levels);
    return {has_levels ? "hierarchical" : "relay", trees.expected(), trees.table()};
}

}  // namespace sparsecoll::plan
