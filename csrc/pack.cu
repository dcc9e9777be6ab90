// Copies and casts of many spans.
#include "tiles.cuh"

namespace sparsecoll {

// The addresses of a tile, and its size in elements.
struct Copy {
    long long destination, source;
    int size;
};

SPARSECOLL_DEVICE Copy copy_tile(const Tables& a, long long tile) {
    return {place_at(a, tile * 5), place_at(a, tile * 5 + 2), static_cast<int>(load_integer(a.table, tile * 5 + 4))};
}

// Copies words, several in flight for each thread.
template <class Word>
SPARSECOLL_DEVICE void copy_words(long long destination, long long source, int num_words) {
    constexpr int in_flight = 4, size = sizeof(Word);
    const int step = static_cast<int>(blockDim.x);
    for (int first = static_cast<int>(threadIdx.x); first < num_words; first += step * in_flight) {
        Word words[in_flight] = {};
#pragma unroll
        for (int w = 0; w < in_flight; ++w) {
            const int word = first + w * step;
            load_word(source + word * size, words[w], word < num_words);
        }
#pragma unroll
        for (int w = 0; w < in_flight; ++w) {
            const int word = first + w * step;
            if (word < num_words) store_word(destination + word * size, words[w]);
        }
    }
}

// Bytes before the destination's first whole word, the words, and bytes behind.
template <class Word>
SPARSECOLL_DEVICE void copy_by(const Copy& copy) {
    constexpr int size = sizeof(Word);
    const int before = static_cast<int>(-copy.destination & (size - 1));
    const int head = before < copy.size ? before : copy.size;
    const int tail = copy.size - (copy.size - head) % size;
    copy_words<unsigned char>(copy.destination, copy.source, head);
    copy_words<Word>(copy.destination + head, copy.source + head, (tail - head) / size);
    copy_words<unsigned char>(copy.destination + tail, copy.source + tail, copy.size - tail);
}

SPARSECOLL_DEVICE void copy_tiles(const Tables& a) {
    for (long long tile = blockIdx.x; tile < a.num_tiles; tile += gridDim.x) {
        const Copy copy = copy_tile(a, tile);
        const long long apart = copy.destination - copy.source;  // what divides it can divide both
        if (apart % 16 == 0) {
            copy_by<Word16>(copy);
        } else if (apart % 8 == 0) {
            copy_by<unsigned long long>(copy);
        } else if (apart % 4 == 0) {
            copy_by<unsigned>(copy);
        } else if (apart % 2 == 0) {
            copy_by<unsigned short>(copy);
        } else {
            copy_words<unsigned char>(copy.destination, copy.source, copy.size);
        }
    }
}

// Casts elements from begin to end in units of Count, several in flight for each thread.
template <class From, class To, int Count>
SPARSECOLL_DEVICE void cast_units(const Copy& copy, int begin, int end) {
    constexpr int in_flight = Count * sizeof(From) == 8 ? 8 : 4;
    const int step = static_cast<int>(blockDim.x) * Count;
    for (int first = begin + static_cast<int>(threadIdx.x) * Count; first < end; first += step * in_flight) {
        From from[in_flight][Count];
#pragma unroll
        for (int u = 0; u < in_flight; ++u) {
            const int element = first + u * step;
            load_elements(copy.source + element * static_cast<int>(sizeof(From)), from[u], element < end);
        }
#pragma unroll
        for (int u = 0; u < in_flight; ++u) {
            const int element = first + u * step;
            To to[Count];
#pragma unroll
            for (int i = 0; i < Count; ++i) to[i] = narrow<To>(widen(from[u][i]));
            if (element < end) store_elements(copy.destination + element * static_cast<int>(sizeof(To)), to);
        }
    }
}

// Four elements are 16 bytes on one side and 8 on the other: neighbouring threads touch neighbouring bytes on both.
template <class From, class To>
SPARSECOLL_DEVICE void cast_tiles(const Tables& a) {
    constexpr int count = 4, from = sizeof(From), to = sizeof(To);
    for (long long tile = blockIdx.x; tile < a.num_tiles; tile += gridDim.x) {
        const Copy copy = copy_tile(a, tile);
        const int before = static_cast<int>(-copy.destination & (count * to - 1)) / to;
        const int head = before < copy.size ? before : copy.size;
        const bool is_aligned =
            (copy.destination + head * to) % (count * to) == 0 && (copy.source + head * from) % (count * from) == 0;
        const int body = is_aligned ? head : copy.size;
        const int tail = copy.size - (copy.size - body) % count;
        cast_units<From, To, 1>(copy, 0, body);
        cast_units<From, To, count>(copy, body, tail);
        cast_units<From, To, 1>(copy, tail, copy.size);
    }
}

SPARSECOLL_KERNEL(pack_copy, Tables, 256, 4, copy_tiles)
SPARSECOLL_KERNEL(pack_float32_bfloat16, Tables, 256, 4, cast_tiles<float, bfloat16>)
SPARSECOLL_KERNEL(pack_float32_float16, Tables, 256, 4, cast_tiles<float, float16>)
SPARSECOLL_KERNEL(pack_bfloat16_float32, Tables, 256, 4, cast_tiles<bfloat16, float>)
SPARSECOLL_KERNEL(pack_float16_float32, Tables, 256, 4, cast_tiles<float16, float>)

}  // namespace sparsecoll
