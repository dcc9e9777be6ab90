// What the CUDA kernels share: reading and writing memory by address, and the taking of turns.
//
// No header of CUDA is needed, so that the run-time compiler has all it needs in the text. The same text is compiled as
// plain C++ for tests without a GPU; what stands between #ifdef and #endif then comes from tests/emulation.
//
// A kernel takes one struct of 64-bit integers, addresses among them. Arithmetic is that of the CPU's kernels to the
// bit wherever its order is fixed: no contraction, rounding to nearest even, division by IEEE.
#pragma once

#ifdef __CUDACC__

#define SPARSECOLL_DEVICE __device__ __forceinline__

// Defines the kernel `name` for blocks of at most `threads`, of which `blocks` fit a multiprocessor together; its body
// is the function that follows. By __grid_constant__ an array in the arguments can be indexed where it lies.
#define SPARSECOLL_KERNEL(name, Arguments, threads, blocks, ...)                                              \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Arguments a) { \
        __VA_ARGS__(a);                                                                                       \
    }

namespace sparsecoll {

struct bfloat16 {
    unsigned short bits;
};

struct float16 {
    unsigned short bits;
};

// The names and meanings of dtype.hpp, in the processor's own instructions.
template <class T>
struct Accumulation {
    using type = T;
};
template <>
struct Accumulation<bfloat16> {
    using type = float;
};
template <>
struct Accumulation<float16> {
    using type = float;
};
template <class T>
using accumulation_t = typename Accumulation<T>::type;

template <class T>
SPARSECOLL_DEVICE T widen(T value) {
    return value;
}

SPARSECOLL_DEVICE float widen(bfloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }

SPARSECOLL_DEVICE float widen(float16 value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
}

template <class T>
SPARSECOLL_DEVICE T narrow(accumulation_t<T> value) {
    return value;
}

template <>
SPARSECOLL_DEVICE bfloat16 narrow<bfloat16>(float value) {
    bfloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

template <>
SPARSECOLL_DEVICE float16 narrow<float16>(float value) {
    float16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

// 16 bytes, in a register or four.
struct alignas(16) Word16 {
    unsigned part[4];
};

// Memory by address, which is a multiple of the size. A load that is not wanted leaves the word as it is; it is a
// predicate and no branch, and volatile keeps accesses in the order of the program, so that loads written one after the
// other are in flight together.
SPARSECOLL_DEVICE void load_word(long long address, Word16& word, bool wanted = true) {
    asm volatile(
        "{\n\t.reg .pred wanted;\n\tsetp.ne.s32 wanted, %5, 0;\n\t"
        "@wanted ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
        : "+r"(word.part[0]), "+r"(word.part[1]), "+r"(word.part[2]), "+r"(word.part[3])
        : "l"(address), "r"(static_cast<int>(wanted))
        : "memory");
}

SPARSECOLL_DEVICE void store_word(long long address, const Word16& word) {
    asm volatile("st.global.v4.u32 [%4], {%0, %1, %2, %3};" ::"r"(word.part[0]), "r"(word.part[1]), "r"(word.part[2]),
                 "r"(word.part[3]), "l"(address)
                 : "memory");
}

#define SPARSECOLL_ACCESS(Word, kind, constraint)                                                           \
    SPARSECOLL_DEVICE void load_word(long long address, Word& word, bool wanted = true) {                   \
        asm volatile("{\n\t.reg .pred wanted;\n\tsetp.ne.s32 wanted, %2, 0;\n\t"                            \
                     "@wanted ld.global." kind " %0, [%1];\n\t}"                                            \
                     : "+" constraint(word)                                                                 \
                     : "l"(address), "r"(static_cast<int>(wanted))                                          \
                     : "memory");                                                                           \
    }                                                                                                       \
    SPARSECOLL_DEVICE void store_word(long long address, const Word& word) {                                \
        asm volatile("st.global." kind " [%1], %0;" ::constraint(word), "l"(address) : "memory");           \
    }
SPARSECOLL_ACCESS(unsigned long long, "u64", "l")
SPARSECOLL_ACCESS(unsigned, "u32", "r")
SPARSECOLL_ACCESS(unsigned short, "u16", "h")
#undef SPARSECOLL_ACCESS

SPARSECOLL_DEVICE void load_word(long long address, unsigned char& word, bool wanted = true) {
    unsigned wide = word;
    asm volatile("{\n\t.reg .pred wanted;\n\tsetp.ne.s32 wanted, %2, 0;\n\t@wanted ld.global.u8 %0, [%1];\n\t}"
                 : "+r"(wide)
                 : "l"(address), "r"(static_cast<int>(wanted))
                 : "memory");
    word = static_cast<unsigned char>(wide);
}

SPARSECOLL_DEVICE void store_word(long long address, const unsigned char& word) {
    asm volatile("st.global.u8 [%1], %0;" ::"r"(static_cast<unsigned>(word)), "l"(address) : "memory");
}

// The launch's shared memory.
template <class T>
SPARSECOLL_DEVICE T* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return reinterpret_cast<T*>(memory);
}

}  // namespace sparsecoll

#endif

namespace sparsecoll {

constexpr unsigned every_lane = 0xffffffffu;

template <int Bytes>
struct WordOf;
template <>
struct WordOf<16> {
    using type = Word16;
};
template <>
struct WordOf<8> {
    using type = unsigned long long;
};
template <>
struct WordOf<4> {
    using type = unsigned;
};
template <>
struct WordOf<2> {
    using type = unsigned short;
};
template <>
struct WordOf<1> {
    using type = unsigned char;
};

SPARSECOLL_DEVICE long long load_integer(long long address, long long i) {
    unsigned long long word;
    load_word(address + i * 8, word);
    return static_cast<long long>(word);
}

SPARSECOLL_DEVICE void store_integer(long long address, long long i, long long value) {
    store_word(address + i * 8, static_cast<unsigned long long>(value));
}

SPARSECOLL_DEVICE long long least(long long a, long long b) { return a < b ? a : b; }

// Count consecutive elements from an address: one element of any alignment, or one or more words of up to 16 bytes, to
// whose size they are aligned. Those that are not wanted are zeros.
template <class T, int Count>
SPARSECOLL_DEVICE void load_elements(long long address, T (&elements)[Count], bool wanted) {
    constexpr int num_bytes = Count * static_cast<int>(sizeof(T));
    if constexpr (Count > 1) {
        constexpr int word_bytes = num_bytes < 16 ? num_bytes : 16, num_words = num_bytes / word_bytes;
        typename WordOf<word_bytes>::type words[num_words] = {};
#pragma unroll
        for (int w = 0; w < num_words; ++w) load_word(address + w * word_bytes, words[w], wanted);
        memcpy(elements, words, num_bytes);
    } else if (address % num_bytes == 0) {
        typename WordOf<num_bytes>::type word = 0;
        load_word(address, word, wanted);
        memcpy(elements, &word, num_bytes);
    } else {
        unsigned long long word = 0;
#pragma unroll 1
        for (int b = 0; b < num_bytes; ++b) {
            unsigned char byte = 0;
            load_word(address + b, byte, wanted);
            word |= static_cast<unsigned long long>(byte) << (8 * b);
        }
        memcpy(elements, &word, num_bytes);
    }
}

template <class T, int Count>
SPARSECOLL_DEVICE void store_elements(long long address, const T (&elements)[Count]) {
    constexpr int num_bytes = Count * static_cast<int>(sizeof(T));
    if constexpr (Count > 1) {
        constexpr int word_bytes = num_bytes < 16 ? num_bytes : 16, num_words = num_bytes / word_bytes;
        typename WordOf<word_bytes>::type words[num_words];
        memcpy(words, elements, num_bytes);
#pragma unroll
        for (int w = 0; w < num_words; ++w) store_word(address + w * word_bytes, words[w]);
    } else if (address % num_bytes == 0) {
        typename WordOf<num_bytes>::type word;
        memcpy(&word, elements, num_bytes);
        store_word(address, word);
    } else {
        unsigned long long word = 0;
        memcpy(&word, elements, num_bytes);
#pragma unroll 1
        for (int b = 0; b < num_bytes; ++b) store_word(address + b, static_cast<unsigned char>(word >> (8 * b)));
    }
}

// Groups of 2^group_bits neighbouring threads take turns at items.
struct Turn {
    long long first, step;
    int lane;
};

SPARSECOLL_DEVICE Turn turn_of(long long group_bits) {
    const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long num_threads = static_cast<long long>(gridDim.x) * blockDim.x;
    return {thread >> group_bits, num_threads >> group_bits, static_cast<int>(thread & ((1 << group_bits) - 1))};
}

}  // namespace sparsecoll
