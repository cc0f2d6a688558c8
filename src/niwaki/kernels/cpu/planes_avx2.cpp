// Products with bit planes by AVX2: one byte of 32 rows per shuffle.

#include "planes.h"

#ifdef NIWAKI_X86

namespace niwaki {
namespace {

// Entry s of a table is the sum of the inputs i for which s has bit i. The eight low entries come first.
NIWAKI_AVX2 void fill_block_avx2(const float* values, BlockTables& made) {
    const __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256 masks[3];
    for (int i = 0; i < 3; ++i) {
        const __m256i bit = _mm256_set1_epi32(1 << i);
        masks[i] = _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(numbers, bit), bit));
    }
    const __m256 positive = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 lower[kBlockTables], upper[kBlockTables], largest_8 = _mm256_setzero_ps();
    made.sum = 0;
    for (int64_t t = 0; t < kBlockTables; ++t, values += 4) {
        __m256 sums = _mm256_and_ps(masks[0], _mm256_broadcast_ss(values));
        sums = _mm256_add_ps(sums, _mm256_and_ps(masks[1], _mm256_broadcast_ss(values + 1)));
        lower[t] = _mm256_add_ps(sums, _mm256_and_ps(masks[2], _mm256_broadcast_ss(values + 2)));
        upper[t] = _mm256_add_ps(lower[t], _mm256_broadcast_ss(values + 3));
        largest_8 = _mm256_max_ps(largest_8, _mm256_and_ps(positive, lower[t]));
        largest_8 = _mm256_max_ps(largest_8, _mm256_and_ps(positive, upper[t]));
        made.sum += values[0] + values[1] + values[2] + values[3];
    }
    alignas(32) float eight[8];
    _mm256_store_ps(eight, largest_8);
    const float largest = *std::max_element(eight, eight + 8);
    made.scale = largest / kLargestEntry;
    const __m256 inverse = _mm256_set1_ps(largest > 0 ? kLargestEntry / largest : 0);
    for (int64_t t = 0; t < kBlockTables; ++t) {
        const __m256i low_8 = _mm256_cvtps_epi32(_mm256_mul_ps(lower[t], inverse));
        const __m256i high_8 = _mm256_cvtps_epi32(_mm256_mul_ps(upper[t], inverse));
        const __m256i entries = _mm256_permute4x64_epi64(_mm256_packs_epi32(low_8, high_8), 0xD8);
        const __m256i low = _mm256_and_si256(entries, _mm256_set1_epi16(255)), high = _mm256_srli_epi16(entries, 8);
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xD8);
        _mm_store_si128(reinterpret_cast<__m128i*>(made.low[t]), _mm256_castsi256_si128(bytes));
        _mm_store_si128(reinterpret_cast<__m128i*>(made.high[t]), _mm256_extracti128_si256(bytes, 1));
    }
}

NIWAKI_AVX2 inline __m256i both_halves(const uint8_t* table) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}

// Adds the sums that one byte of 32 rows selects. Unpacking bytes to 16 bits leaves rows 0-7 and 16-23 in `even`, and the
// others in `odd`.
NIWAKI_AVX2 inline void look_up(const uint8_t* plane, const BlockTables* tables, int i, __m256i& even, __m256i& odd) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i rows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane));
    const __m256i first = _mm256_and_si256(rows, nibble);
    const __m256i second = _mm256_and_si256(_mm256_srli_epi16(rows, 4), nibble);
    const __m256i low = _mm256_shuffle_epi8(both_halves(tables->low[2 * i]), first);
    const __m256i high = _mm256_shuffle_epi8(both_halves(tables->high[2 * i]), first);
    const __m256i low2 = _mm256_shuffle_epi8(both_halves(tables->low[2 * i + 1]), second);
    const __m256i high2 = _mm256_shuffle_epi8(both_halves(tables->high[2 * i + 1]), second);
    even = _mm256_add_epi16(even, _mm256_unpacklo_epi8(low, high));
    odd = _mm256_add_epi16(odd, _mm256_unpackhi_epi8(low, high));
    even = _mm256_add_epi16(even, _mm256_unpacklo_epi8(low2, high2));
    odd = _mm256_add_epi16(odd, _mm256_unpackhi_epi8(low2, high2));
}

NIWAKI_AVX2 void sum_plane_avx2(const uint8_t* plane, const BlockTables* tables, int64_t bytes, float* acc) {
    RowSums rows = load_rows(acc);
    for (int64_t left = bytes; left > 0; left -= kBlockBytes, plane += kBlockBytes * kPlaneTile, ++tables) {
        __m256i even = _mm256_setzero_si256(), odd = even;
        look_up(plane, tables, 0, even, odd);
        if (left >= kBlockBytes) {
            look_up(plane + kPlaneTile, tables, 1, even, odd);
            look_up(plane + 2 * kPlaneTile, tables, 2, even, odd);
            look_up(plane + 3 * kPlaneTile, tables, 3, even, odd);
        } else {
            for (int i = 1; i < left; ++i) look_up(plane + i * kPlaneTile, tables, i, even, odd);
        }
        add_block(even, odd, tables->scale, rows);
    }
    store_rows(rows, acc);
}

NIWAKI_AVX2 inline __m256 eight_halves(const uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

NIWAKI_AVX2 void finish_avx2(const PlaneProduct& p, int64_t at, int64_t rows, const float* total, float x_sum,
                             float* out) {
    const int64_t whole = rows / 8 * 8;
    const __m256 sum = _mm256_set1_ps(x_sum), centre = _mm256_set1_ps(p.centre);
    for (int64_t row = 0; row < whole; row += 8) {
        const __m256 scale = eight_halves(p.scale + at + row);
        __m256 added = _mm256_mul_ps(scale, _mm256_loadu_ps(total + row));
        if (p.offset) {
            added = _mm256_fmadd_ps(eight_halves(p.offset + at + row), sum, added);
        } else {
            __m256 zero = centre;
            if (p.zero) {
                const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p.zero + at + row));
                zero = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes));
            }
            added = _mm256_fnmadd_ps(_mm256_mul_ps(zero, scale), sum, added);
        }
        _mm256_storeu_ps(out + row, _mm256_add_ps(_mm256_loadu_ps(out + row), added));
    }
    if (whole < rows) kPlanesPortable.finish(p, at + whole, rows - whole, total + whole, x_sum, out + whole);
}

}  // namespace

const PlaneKernels kPlanesAvx2{fill_block_avx2, sum_plane_avx2, finish_avx2};

}  // namespace niwaki

#endif
