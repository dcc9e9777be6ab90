// Run-time choice of instruction set, and the split of a loop over threads.
#pragma once

#include <algorithm>
#include <cstdint>

// [Note: dispatch] One wheel runs on every x86-64: GCC compiles a function so marked once per level and the
// dynamic linker picks the best that the processor has. Kernels mark one explicit entry point per dtype, whose
// templated body is always_inline; threads are started outside, since an outlined parallel region would lose the
// clone's target. Sanitizers start too late for the linker's choice.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SPARSECOLL_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SPARSECOLL_CLONES
#endif

namespace sparsecoll {

// Calls body(begin, end) on contiguous parts of 0..size whose bounds are multiples of `grain`. With one thread or
// one grain there is no parallel region. The split never shows in results: elements are independent.
template <class Body>
void for_each_part(std::int64_t size, std::int64_t grain, int num_threads, const Body& body) {
    const std::int64_t num_grains = (size + grain - 1) / grain;
    const auto num_parts = static_cast<int>(std::min<std::int64_t>(num_threads, num_grains));
    if (num_parts <= 1) {
        body(std::int64_t{0}, size);
        return;
    }
#pragma omp parallel for num_threads(num_parts) schedule(static)
    for (int part = 0; part < num_parts; ++part) {
        const std::int64_t share = num_grains / num_parts, extra = num_grains % num_parts;
        const std::int64_t first = part * share + std::min<std::int64_t>(part, extra);
        const std::int64_t last = first + share + (part < extra ? 1 : 0);
        body(first * grain, std::min(last * grain, size));
    }
}

}  // namespace sparsecoll
