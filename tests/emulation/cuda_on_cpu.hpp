// CUDA's words in plain C++, so that the text of the kernels runs on the CPU. Included before it.
//
// Blocks run one after the other, the threads of a block as fibers: a thread runs until it waits, and a seed draws who
// goes before whom, warps and the threads of each, as well as the order of blocks. Some so get as far ahead as barriers
// let them: kernels that lack one give other results, and threads that wait for what never comes are reported. So are
// addresses that are not aligned or not among those allowed, and writes past shared memory, which each block finds full
// of garbage. All state belongs to one launch, and launches on several host threads are apart.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

#include "dtype.hpp"

namespace emulation {

using Kernel = void (*)(const void* arguments);

constexpr int warp_size = 32;
constexpr std::size_t stack_bytes = 1 << 16, red_zone_bytes = 64, most_shared_bytes = 48 << 10;
constexpr unsigned char garbage = 0xA5;

struct Index {
    unsigned x;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[stack_bytes]};
    int thread = -1;
};

// Threads that meet, and the values that they bring.
struct Meeting {
    std::vector<Fiber*> waiting;
    std::source_location place;
    unsigned long long brought[warp_size], met[warp_size];
};

struct Range {
    long long begin, end;
};

class Launch {
  public:
    Launch(Kernel kernel, const void* arguments, unsigned grid, unsigned block, std::size_t shared_bytes, unsigned seed,
           std::vector<Range> allowed)
        : grid(grid), block(block), kernel_(kernel), arguments_(arguments), shared_bytes_(shared_bytes), random_(seed),
          allowed_(std::move(allowed)), shared_(shared_bytes + red_zone_bytes + 16), warps_(block / warp_size),
          rank_(block) {}

    std::string run(unsigned first_block, unsigned num_blocks) {
        std::vector<unsigned> order(num_blocks);
        std::iota(order.begin(), order.end(), first_block);
        std::shuffle(order.begin(), order.end(), random_);
        for (const unsigned number : order) {
            if (failure_.empty()) run_block(number);
        }
        return failure_;
    }

    // Ends the launch; called by a thread of it.
    [[noreturn]] void fail(const std::string& what) {
        failure_ = what + " in block " + std::to_string(block_number) + ", thread " + std::to_string(running->thread);
        swapcontext(&running->context, &scheduler_);
        __builtin_unreachable();
    }

    // Ends the launch unless it may touch these bytes.
    void check_access(long long address, long long num_bytes) {
        if (address % num_bytes != 0) fail("an address that " + std::to_string(num_bytes) + " does not divide");
        const auto holds = [&](Range range) { return range.begin <= address && address + num_bytes <= range.end; };
        if (!allowed_.empty() && std::none_of(allowed_.begin(), allowed_.end(), holds)) {
            fail("an access of " + std::to_string(num_bytes) + " bytes where nothing is");
        }
    }

    void meet_block(std::source_location place) { meet(all_, block, place); }

    // Brings a value and takes those of all lanes.
    const unsigned long long* meet_warp(unsigned mask, unsigned long long value, std::source_location place) {
        if (mask != 0xffffffffu) fail("a warp meets without all of its lanes");
        Meeting& warp = warps_[static_cast<std::size_t>(running->thread / warp_size)];
        warp.brought[running->thread % warp_size] = value;
        meet(warp, warp_size, place);
        return warp.met;
    }

    unsigned char* shared() {
        return reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(shared_.data()) + 15) / 16 * 16);
    }

    const unsigned grid, block;
    unsigned block_number = 0;
    Fiber* running = nullptr;

  private:
    void run_block(unsigned number) {
        block_number = number;
        std::fill(shared_.begin(), shared_.end(), garbage);
        draw_order();
        std::size_t num_fibers = 0;
        num_done_ = 0;
        ready_.clear();
        while (num_done_ < block && failure_.empty()) {
            if (ready_.empty() && unstarted_.empty()) return describe_deadlock();
            if (unstarted_.empty() || (!ready_.empty() && rank_[ready_.front()->thread] < rank_[unstarted_.back()])) {
                running = ready_.front();
                std::pop_heap(ready_.begin(), ready_.end(), later_);
                ready_.pop_back();
            } else {
                if (num_fibers == fibers_.size()) fibers_.push_back(std::make_unique<Fiber>());
                running = fibers_[num_fibers++].get();
                prepare(*running);
            }
            swapcontext(&scheduler_, &running->context);
        }
        const unsigned char* end = shared() + shared_bytes_;
        if (!std::all_of(end, end + red_zone_bytes, [](unsigned char byte) { return byte == garbage; })) {
            failure_ = "writes past shared memory in block " + std::to_string(number);
        }
    }

    void draw_order() {
        std::vector<int> warps(warps_.size()), lanes(warp_size);
        std::iota(warps.begin(), warps.end(), 0);
        std::shuffle(warps.begin(), warps.end(), random_);
        unstarted_.clear();
        for (const int warp : warps) {
            std::iota(lanes.begin(), lanes.end(), 0);
            std::shuffle(lanes.begin(), lanes.end(), random_);
            for (const int lane : lanes) unstarted_.push_back(warp * warp_size + lane);
        }
        for (std::size_t place = 0; place < block; ++place) rank_[unstarted_[place]] = static_cast<int>(block - place);
    }

    void prepare(Fiber& fiber) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = stack_bytes;
        fiber.context.uc_link = &scheduler_;
        makecontext(&fiber.context, [] { current->run_threads(); }, 0);
    }

    // A fiber runs one thread after the other until one waits, so that kernels without barriers need only one.
    void run_threads() {
        while (!unstarted_.empty()) {
            running->thread = unstarted_.back();
            unstarted_.pop_back();
            kernel_(arguments_);
            ++num_done_;
        }
    }

    void meet(Meeting& meeting, std::size_t size, std::source_location place) {
        if (meeting.waiting.empty()) {
            meeting.place = place;
        } else if (meeting.place.line() != place.line()) {
            fail("threads meet at lines " + std::to_string(meeting.place.line()) + " and " +
                 std::to_string(place.line()) + " of " + place.file_name());
        }
        meeting.waiting.push_back(running);
        if (meeting.waiting.size() == size) {
            std::copy_n(meeting.brought, warp_size, meeting.met);
            for (Fiber* fiber : meeting.waiting) {
                ready_.push_back(fiber);
                std::push_heap(ready_.begin(), ready_.end(), later_);
            }
            meeting.waiting.clear();
        }
        swapcontext(&running->context, &scheduler_);
    }

    void describe_deadlock() {
        const Meeting* meeting = &all_;
        for (const Meeting& warp : warps_) {
            if (!warp.waiting.empty()) meeting = &warp;
        }
        failure_ = std::to_string(meeting->waiting.size()) + " threads wait for others that never come, at line " +
                   std::to_string(meeting->place.line()) + " of " + meeting->place.file_name() + " in block " +
                   std::to_string(block_number);
    }

    const Kernel kernel_;
    const void* const arguments_;
    const std::size_t shared_bytes_;
    std::mt19937 random_;
    const std::vector<Range> allowed_;
    std::vector<unsigned char> shared_;
    std::vector<Meeting> warps_;
    std::vector<int> rank_;
    Meeting all_;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    const std::function<bool(const Fiber*, const Fiber*)> later_ = [this](const Fiber* a, const Fiber* b) {
        return rank_[a->thread] > rank_[b->thread];
    };
    std::vector<Fiber*> ready_;  // a heap, the first to go on at its front
    std::vector<int> unstarted_;
    unsigned num_done_ = 0;
    std::string failure_;
    ucontext_t scheduler_;

  public:
    static inline thread_local Launch* current = nullptr;
};

inline unsigned this_thread() { return static_cast<unsigned>(Launch::current->running->thread); }

}  // namespace emulation

#define threadIdx (::emulation::Index{::emulation::this_thread()})
#define blockIdx (::emulation::Index{::emulation::Launch::current->block_number})
#define blockDim (::emulation::Index{::emulation::Launch::current->block})
#define gridDim (::emulation::Index{::emulation::Launch::current->grid})

inline void __syncthreads(std::source_location place = std::source_location::current()) {
    emulation::Launch::current->meet_block(place);
}

inline void __syncwarp(std::source_location place = std::source_location::current()) {
    emulation::Launch::current->meet_warp(0xffffffffu, 0, place);
}

// The value that another lane brings; one's own where there is no such lane.
template <class T>
T value_of_lane(unsigned mask, T value, unsigned lane, std::source_location place) {
    unsigned long long bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    const unsigned long long* met = emulation::Launch::current->meet_warp(mask, bits, place);
    if (lane < emulation::warp_size) std::memcpy(&value, met + lane, sizeof(T));
    return value;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned with,
                  std::source_location place = std::source_location::current()) {
    return value_of_lane(mask, value, threadIdx.x % emulation::warp_size ^ with, place);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by,
                 std::source_location place = std::source_location::current()) {
    return value_of_lane(mask, value, threadIdx.x % emulation::warp_size - by, place);
}

inline unsigned __match_any_sync(unsigned mask, unsigned value,
                                 std::source_location place = std::source_location::current()) {
    const unsigned long long* met = emulation::Launch::current->meet_warp(mask, value, place);
    unsigned equal = 0;
    for (int lane = 0; lane < emulation::warp_size; ++lane) equal |= (met[lane] == value ? 1u : 0u) << lane;
    return equal;
}

inline int __popc(unsigned bits) { return std::popcount(bits); }

#define SPARSECOLL_DEVICE inline

// Exports the kernel with the size of its arguments.
#define SPARSECOLL_KERNEL(name, Arguments, threads, blocks, ...)                                   \
    extern "C" {                                                                                   \
    extern const long long name##_bytes = sizeof(Arguments);                                       \
    void name(const void* arguments) {                                                             \
        if (blockDim.x > threads) ::emulation::Launch::current->fail("too many threads in a block"); \
        __VA_ARGS__(*static_cast<const Arguments*>(arguments));                                    \
    }                                                                                              \
    }

namespace sparsecoll {

struct alignas(16) Word16 {
    unsigned part[4];
};

template <class Word>
void load_word(long long address, Word& word, bool wanted = true) {
    if (!wanted) return;
    emulation::Launch::current->check_access(address, sizeof(Word));
    std::memcpy(&word, reinterpret_cast<const void*>(address), sizeof(Word));
}

template <class Word>
void store_word(long long address, const Word& word) {
    emulation::Launch::current->check_access(address, sizeof(Word));
    std::memcpy(reinterpret_cast<void*>(address), &word, sizeof(Word));
}

template <class T>
T* shared_memory() {
    return reinterpret_cast<T*>(emulation::Launch::current->shared());
}

}  // namespace sparsecoll

// Runs some blocks of a launch, and returns what was wrong or an empty text, valid until this host thread launches
// again. Where no ranges are allowed, all are.
extern "C" [[gnu::used]] inline const char* run_kernel(emulation::Kernel kernel, const void* arguments, unsigned grid,
                                                       unsigned block, unsigned long long shared_bytes,
                                                       unsigned first_block, unsigned num_blocks, unsigned seed,
                                                       const emulation::Range* allowed, unsigned num_allowed) {
    static thread_local std::string failure;
    if (grid == 0 || grid > 0x7fffffffu || block == 0 || block > 1024 || block % emulation::warp_size != 0 ||
        shared_bytes > emulation::most_shared_bytes) {
        failure = "a launch that no device takes";
        return failure.c_str();
    }
    emulation::Launch launch(kernel, arguments, grid, block, shared_bytes, seed, {allowed, allowed + num_allowed});
    emulation::Launch::current = &launch;
    failure = launch.run(first_block, num_blocks);
    emulation::Launch::current = nullptr;
    return failure.c_str();
}
