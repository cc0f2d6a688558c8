// Products with bit planes by AVX-512: two bytes of 32 rows per shuffle.

#include "planes.h"

#ifdef NIWAKI_X86

namespace niwaki {
namespace {

// Adds the sums that two bytes of 32 rows select: the first byte in the lower half, the second byte in the upper half.
NIWAKI_AVX512 inline void look_up_two(const uint8_t* plane, const BlockTables* tables, int i, __m512i& even,
                                      __m512i& odd) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i rows = _mm512_loadu_si512(plane);
    const __m512i low = _mm512_load_si512(tables->low[2 * i]), high = _mm512_load_si512(tables->high[2 * i]);
    const __m512i first = _mm512_and_si512(rows, nibble);
    const __m512i second = _mm512_and_si512(_mm512_srli_epi16(rows, 4), nibble);
    // Tables 0 and 2 belong to the low nibbles, tables 1 and 3 to the high nibbles.
    const __m512i low_1 = _mm512_shuffle_epi8(_mm512_shuffle_i64x2(low, low, 0xA0), first);
    const __m512i high_1 = _mm512_shuffle_epi8(_mm512_shuffle_i64x2(high, high, 0xA0), first);
    const __m512i low_2 = _mm512_shuffle_epi8(_mm512_shuffle_i64x2(low, low, 0xF5), second);
    const __m512i high_2 = _mm512_shuffle_epi8(_mm512_shuffle_i64x2(high, high, 0xF5), second);
    even = _mm512_add_epi16(even, _mm512_unpacklo_epi8(low_1, high_1));
    odd = _mm512_add_epi16(odd, _mm512_unpackhi_epi8(low_1, high_1));
    even = _mm512_add_epi16(even, _mm512_unpacklo_epi8(low_2, high_2));
    odd = _mm512_add_epi16(odd, _mm512_unpackhi_epi8(low_2, high_2));
}

NIWAKI_AVX512 inline __m256i folded(__m512i sums) {
    return _mm256_add_epi16(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
}

}  // namespace

NIWAKI_AVX512 void sum_plane_avx512(const uint8_t* plane, const BlockTables* tables, int64_t bytes, float* acc) {
    RowSums rows = load_rows(acc);
    int64_t left = bytes;
    for (; left >= kBlockBytes; left -= kBlockBytes, plane += kBlockBytes * kPlaneTile, ++tables) {
        __m512i even = _mm512_setzero_si512(), odd = even;
        look_up_two(plane, tables, 0, even, odd);
        look_up_two(plane + 2 * kPlaneTile, tables, 2, even, odd);
        add_block(folded(even), folded(odd), tables->scale, rows);
    }
    store_rows(rows, acc);
    if (left) kPlanesAvx2.sum_plane(plane, tables, left, acc);
}

}  // namespace niwaki

#endif
