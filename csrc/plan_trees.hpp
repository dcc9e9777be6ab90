// Relayed schedules: every byte of a chunk travels along a tree of holders.
#pragma once

#include <cstdint>
#include <vector>

#include "plan.hpp"
#include "plan_schedule.hpp"
#include "plan_shares.hpp"

namespace sparsecoll::plan {

class Trees {
  public:
    // With regard to nodes, or as if all ranks were on one.
    Trees(const Case& given, const Holdings& holdings, bool has_levels);

    // Ticks that the busiest link needs for its bytes; and with latencies and the filling of the pipeline.
    Ticks level() const { return level_; }
    Ticks expected() const { return expected_; }
    Table table() const;

  private:
    struct Hop {
        std::int32_t depth, src, dst;
    };
    // Hops of a cell's tree whose pieces are due together, as they follow from one rank's work.
    struct Branch {
        std::size_t end_hop;
        std::size_t line;  // of work that this rank does on one link
        std::int64_t carried_bytes;
    };
    // A range of a chunk and its tree. Branches and hops begin where those before them end.
    struct Cell {
        std::size_t item;
        std::int64_t begin, end;
        std::size_t end_branch, end_hop;
    };
    // Who does what with a cell.
    struct Roles {
        std::int32_t inside_relay, sender, relay;
        std::vector<std::int32_t> entrances;  // into the other nodes
    };
    // The ranks but the owner that send a cell on; in the mirror they send a sum.
    class Forwards {
      public:
        explicit Forwards(const Trees& trees)
            : trees_(trees), last_cell_(trees.mirrored_ ? trees.schedule_.links.world_size() : 0) {}
        void begin_cell(std::size_t first_hop, std::size_t end_hop);
        bool has(std::int32_t rank) const {
            return trees_.mirrored_ && last_cell_[static_cast<std::size_t>(rank)] == cell_;
        }

      private:
        const Trees& trees_;
        std::vector<std::size_t> last_cell_;  // of each rank: the last cell that it forwards, counted from 1
        std::size_t cell_ = 0;
    };

    void add_cells(const Between& between, const Entries& entries, const Partitions& inside);
    void add_cell(std::size_t item, std::int64_t begin, std::int64_t end, const Roles& roles);
    void enter(std::size_t item, std::int32_t depth, std::int32_t src, std::int32_t entrance);
    void spread(std::int32_t depth, std::int32_t source, std::span<const std::int32_t> ranks, std::int32_t relay);
    void add_branch(std::int32_t carrier, std::int64_t carried_bytes, bool is_relayed, bool crosses);
    void measure();
    std::int64_t slots_of(const Branch& branch) const;

    Schedule schedule_;
    bool mirrored_;
    std::vector<Cell> cells_;
    std::vector<Branch> branches_;
    std::vector<Hop> hops_;
    Ticks level_ = 0, expected_ = 0;
    std::int64_t num_pieces_ = 1;
    std::int32_t num_slots_ = 1;
    std::int64_t latency_slots_ = 0;
};

}  // namespace sparsecoll::plan
