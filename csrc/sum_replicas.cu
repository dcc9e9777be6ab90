// Sums of many sources in a fixed order, many sums in one launch.
#include "tiles.cuh"

namespace sparsecoll {

// Integers that share a register, and wrap each in its own bits.
template <unsigned Highest>
struct Packed {
    unsigned bits;
};
using packed8 = Packed<0x80808080u>;
using packed16 = Packed<0x80008000u>;

// The highest bit of each is a sum without carry, and what is below cannot carry out of it.
template <unsigned Highest>
SPARSECOLL_DEVICE Packed<Highest> operator+(Packed<Highest> a, Packed<Highest> b) {
    return {((a.bits & ~Highest) + (b.bits & ~Highest)) ^ ((a.bits ^ b.bits) & Highest)};
}

template <class T>
constexpr bool is_float = false;
template <>
constexpr bool is_float<float> = true;
template <>
constexpr bool is_float<double> = true;

constexpr int sum_units_in_flight = 4;

// A tile of a sum: where the sum's words stand in the table, and which of its elements belong to the tile.
struct SumTile {
    long long destination, first_source, end_of_sources, divisor, begin;
    int size;
};

SPARSECOLL_DEVICE SumTile sum_tile(const Tables& a, long long tile) {
    const long long sum = load_integer(a.table, tile * 3);
    return {sum,
            sum + 5,
            sum + 5 + 3 * load_integer(a.table, sum + 4),
            load_integer(a.table, sum + 3),
            load_integer(a.table, tile * 3 + 1),
            static_cast<int>(load_integer(a.table, tile * 3 + 2))};
}

template <class T>
SPARSECOLL_DEVICE bool is_partial_at(const Tables& a, long long word) {
    return sizeof(T) != sizeof(accumulation_t<T>) && load_integer(a.table, word + 2) != 0;
}

// The address of the tile's first element in the place at a word of the table.
template <class T>
SPARSECOLL_DEVICE long long address_at(const Tables& a, long long word, const SumTile& tile) {
    const long long bytes = is_partial_at<T>(a, word) ? sizeof(accumulation_t<T>) : sizeof(T);
    return place_at(a, word) + tile.begin * bytes;
}

// Adds to sums, or begins them with, units of Count times Stored, each of which has Ratio elements. Unit u has the
// elements from `first + u * step` on, if they lie before `end`.
template <class Stored, int Ratio, int Count, class Accumulated>
SPARSECOLL_DEVICE void add_units(Accumulated (&sums)[sum_units_in_flight][Count], long long source, int first, int step,
                                 int end, bool begins) {
    Stored elements[sum_units_in_flight][Count];
#pragma unroll
    for (int u = 0; u < sum_units_in_flight; ++u) {
        const int element = first + u * step;
        load_elements(source + element * static_cast<int>(sizeof(Stored)) / Ratio, elements[u], element < end);
    }
#pragma unroll
    for (int u = 0; u < sum_units_in_flight; ++u) {
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            const Accumulated value = widen(elements[u][i]);
            sums[u][i] = begins ? value : static_cast<Accumulated>(sums[u][i] + value);
        }
    }
}

// Sums elements of a tile from begin to end in units of Count times Wide, each of which has Ratio elements of T. Every
// element is read before it is written, and by the same thread, so that the destination may be a source.
template <class T, class Wide, int Count>
SPARSECOLL_DEVICE void sum_units(const Tables& a, const SumTile& tile, int begin, int end) {
    using Accumulated = accumulation_t<Wide>;
    constexpr int ratio = sizeof(Wide) / sizeof(T), unit = Count * ratio;
    const long long destination = address_at<T>(a, tile.destination, tile);
    const bool is_partial = is_partial_at<T>(a, tile.destination);
    const int step = static_cast<int>(blockDim.x) * unit;
    for (int first = begin + static_cast<int>(threadIdx.x) * unit; first < end; first += step * sum_units_in_flight) {
        Accumulated sums[sum_units_in_flight][Count] = {};
        for (long long word = tile.first_source; word < tile.end_of_sources; word += 3) {
            const long long source = address_at<T>(a, word, tile);
            const bool begins = word == tile.first_source;  // as zero plus a negative zero would lose the sign
            if (is_partial_at<T>(a, word)) {
                add_units<Accumulated, ratio>(sums, source, first, step, end, begins);
            } else {
                add_units<Wide, ratio>(sums, source, first, step, end, begins);
            }
        }
#pragma unroll
        for (int u = 0; u < sum_units_in_flight; ++u) {
            const int element = first + u * step;
            if constexpr (is_float<Accumulated>) {
                if (tile.divisor != 1) {
#pragma unroll
                    for (int i = 0; i < Count; ++i) sums[u][i] /= static_cast<Accumulated>(tile.divisor);
                }
            }
            if (element >= end) {
            } else if (is_partial) {
                store_elements(destination + element * static_cast<int>(sizeof(Accumulated)) / ratio, sums[u]);
            } else {
                Wide stored[Count];
#pragma unroll
                for (int i = 0; i < Count; ++i) stored[i] = narrow<Wide>(sums[u][i]);
                store_elements(destination + element * static_cast<int>(sizeof(Wide)) / ratio, stored);
            }
        }
    }
}

// Elements of a tile after which all places are aligned to 16 bytes, or -1 if there is no such number.
template <class T>
SPARSECOLL_DEVICE int head_of(const Tables& a, const SumTile& tile) {
    // Where some places are partial, the narrower elements of another tell more.
    long long narrowest = tile.destination;
    for (long long word = tile.first_source; word < tile.end_of_sources && is_partial_at<T>(a, narrowest); word += 3) {
        narrowest = word;
    }
    const auto bytes = [&](long long word) -> int {
        return is_partial_at<T>(a, word) ? sizeof(accumulation_t<T>) : sizeof(T);
    };
    const int head = static_cast<int>(-address_at<T>(a, narrowest, tile) & 15) / bytes(narrowest);
    long long addresses = address_at<T>(a, tile.destination, tile) + head * bytes(tile.destination);
    for (long long word = tile.first_source; word < tile.end_of_sources; word += 3) {
        addresses |= address_at<T>(a, word, tile) + head * bytes(word);
    }
    return addresses % 16 == 0 ? head : -1;
}

// Wide is T, or several of T that are added at once.
template <class T, class Wide = T>
SPARSECOLL_DEVICE void sum_tiles(const Tables& a) {
    constexpr int count = 16 / sizeof(Wide), elements_of_a_word = 16 / sizeof(T);
    for (long long number = blockIdx.x; number < a.num_tiles; number += gridDim.x) {
        const SumTile tile = sum_tile(a, number);
        const int head = head_of<T>(a, tile);
        const int body = head < 0 ? tile.size : head < tile.size ? head : tile.size;
        const int tail = tile.size - (tile.size - body) % elements_of_a_word;
        sum_units<T, T, 1>(a, tile, 0, body);
        sum_units<T, Wide, count>(a, tile, body, tail);
        sum_units<T, T, 1>(a, tile, tail, tile.size);
    }
}

SPARSECOLL_KERNEL(sum_replicas_float32, Tables, 256, 3, sum_tiles<float>)
SPARSECOLL_KERNEL(sum_replicas_float64, Tables, 256, 3, sum_tiles<double>)
SPARSECOLL_KERNEL(sum_replicas_bfloat16, Tables, 256, 3, sum_tiles<bfloat16>)
SPARSECOLL_KERNEL(sum_replicas_float16, Tables, 256, 3, sum_tiles<float16>)
SPARSECOLL_KERNEL(sum_replicas_bits8, Tables, 256, 3, sum_tiles<unsigned char, packed8>)
SPARSECOLL_KERNEL(sum_replicas_bits16, Tables, 256, 3, sum_tiles<unsigned short, packed16>)
SPARSECOLL_KERNEL(sum_replicas_bits32, Tables, 256, 3, sum_tiles<unsigned>)
SPARSECOLL_KERNEL(sum_replicas_bits64, Tables, 256, 3, sum_tiles<unsigned long long>)

}  // namespace sparsecoll
