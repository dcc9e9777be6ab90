#include "plan_holdings.hpp"

#include <algorithm>
#include <cstring>

namespace sparsecoll::plan {

Holdings::Holdings(const Case& given) : begins{0} {
    const std::size_t world_size = given.links.world_size();
    chunks.reserve(given.chunks.size());
    begins.reserve(given.chunks.size() + 1);
    ranks.reserve(given.chunks.size() * 4);
    for (std::int64_t chunk : given.chunks) {
        const bool* mask = given.holders + static_cast<std::size_t>(chunk) * world_size;
        for (std::size_t rank = 0; rank < world_size;) {
            // Most ranks do not hold most chunks.
            std::uint64_t eight = 0;
            if (rank + sizeof eight <= world_size && (std::memcpy(&eight, mask + rank, sizeof eight), !eight)) {
                rank += sizeof eight;
                continue;
            }
            for (const std::size_t end = std::min(rank + sizeof eight, world_size); rank < end; ++rank)
                if (mask[rank]) ranks.push_back(static_cast<std::int32_t>(rank));
        }
        const std::size_t count = ranks.size() - begins.back();
        if (count > 1) {
            chunks.push_back(chunk);
            begins.push_back(ranks.size());
            most = std::max(most, count);
        } else {
            ranks.resize(begins.back());
        }
    }
}

}  // namespace sparsecoll::plan
