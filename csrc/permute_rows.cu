// destination[i] = source[index[i]]; zeros where the index is negative.
#include "kernels.cuh"

namespace sparsecoll {

// Rows are cut into segments of at most permute_words words for each thread of a group. Sizes are in words.
struct PermuteRows {
    long long destination, source, index, num_rows, row_words, segment_words, num_segments, group_bits;
};

constexpr int permute_words = 4;  // in flight, for each thread

template <class Word>
SPARSECOLL_DEVICE void permute_rows(const PermuteRows& a) {
    const long long row_bytes = a.row_words * static_cast<long long>(sizeof(Word));
    const long long group = 1ll << a.group_bits;
    const long long num_items = a.num_rows * a.num_segments;
    const Turn turn = turn_of(a.group_bits);
    for (long long item = turn.first; item < num_items; item += turn.step) {
        const long long row = a.num_segments == 1 ? item : item / a.num_segments;
        const long long first = (item - row * a.num_segments) * a.segment_words;
        const long long end = least(first + a.segment_words, a.row_words);
        const long long from = load_integer(a.index, row);
        const long long source = a.source + from * row_bytes, destination = a.destination + row * row_bytes;
        Word words[permute_words] = {};
#pragma unroll
        for (int w = 0; w < permute_words; ++w) {
            const long long word = first + turn.lane + w * group;
            load_word(source + word * static_cast<long long>(sizeof(Word)), words[w], from >= 0 && word < end);
        }
#pragma unroll
        for (int w = 0; w < permute_words; ++w) {
            const long long word = first + turn.lane + w * group;
            if (word < end) store_word(destination + word * static_cast<long long>(sizeof(Word)), words[w]);
        }
    }
}

SPARSECOLL_KERNEL(permute_rows_16, PermuteRows, 256, 4, permute_rows<Word16>)
SPARSECOLL_KERNEL(permute_rows_8, PermuteRows, 256, 4, permute_rows<unsigned long long>)
SPARSECOLL_KERNEL(permute_rows_4, PermuteRows, 256, 4, permute_rows<unsigned>)
SPARSECOLL_KERNEL(permute_rows_2, PermuteRows, 256, 4, permute_rows<unsigned short>)
SPARSECOLL_KERNEL(permute_rows_1, PermuteRows, 256, 4, permute_rows<unsigned char>)

}  // namespace sparsecoll
