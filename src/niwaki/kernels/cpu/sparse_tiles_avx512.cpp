// Products with tiles by AVX-512: eight columns of 32 rows per step.

#include "sparse_tiles.h"

#ifdef NIWAKI_X86

namespace niwaki {
namespace {

// Alternates two tables of inputs for four columns each: lanes 0 and 2 belong to the first four columns.
NIWAKI_AVX512 inline __m512i in_turns(const int8_t* table) {
    return _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(table)));
}

// Does the same as with AVX2, for eight columns. The first four are in lanes 0 (rows 0 to 7) and 2 (rows 8 to 15).
NIWAKI_AVX512 inline void add_pairs(__m512i codes, __m512i index, __m512i high, __m512i low, __m512i& highs,
                                    __m512i& lows) {
    constexpr int where_set = 0xca;  // bits of the second operand where the first is set, else of the third
    const __m512i key = _mm512_ternarylogic_epi64(_mm512_set1_epi8(kNegative), codes, index, where_set);
    const __m512i sizes = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kSizes)));
    const __m512i size = _mm512_shuffle_epi8(sizes, codes);
    highs = _mm512_add_epi16(highs, _mm512_maddubs_epi16(size, _mm512_shuffle_epi8(high, key)));
    lows = _mm512_add_epi16(lows, _mm512_maddubs_epi16(size, _mm512_shuffle_epi8(low, key)));
}

// Returns the scales of `eight_scales`, twice each.
NIWAKI_AVX512 inline __m512 doubled_scales(const uint16_t* from) {
    const __m256 eight = eight_scales(from);
    const __m512 lower = _mm512_castps128_ps512(_mm256_castps256_ps128(eight));
    const __m512 upper = _mm512_castps128_ps512(_mm256_extractf128_ps(eight, 1));
    return _mm512_shuffle_f32x4(lower, upper, 0);
}

}  // namespace

NIWAKI_AVX512 void tile_avx512(const TileProduct& p, int64_t tile, const BlockInputs* inputs, float* out) {
    const __m512i nibble = _mm512_set1_epi8(15), two_bits = _mm512_set1_epi8(kIndex);
    const __m512i weights = _mm512_set1_epi32(128 | 1 << 16);
    const __m512i spread = _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), turns = _mm512_setr_epi64(0, 1, 4, 5, 2, 3, 6, 7);
    const __m512i lower_bits = _mm512_setr_epi64(0, 0, 0x0004000400040004, 0x0004000400040004, 0, 0, 0x0004000400040004,
                                                 0x0004000400040004);  // the second four columns have the upper half byte
    const __m512i upper_bits = _mm512_add_epi16(lower_bits, _mm512_set1_epi16(2));
    const int64_t fours = p.columns / 4;
    const auto* places = reinterpret_cast<const __m256i*>(p.places) + tile * fours / 2;
    const uint8_t* codes = p.codes + tile * fours * kTileRows;
    __m512 total[4];
    for (__m512& rows : total) rows = _mm512_setzero_ps();
    for (int64_t group = 0; group * p.group < p.columns; ++group) {
        __m512 sums[4];
        for (__m512& rows : sums) rows = _mm512_setzero_ps();
        for (int64_t b = group * p.group / kInputBlock; b < std::min(p.columns, (group + 1) * p.group) / kInputBlock; ++b) {
            const BlockInputs& own = inputs[b];
            __m512i highs[2], lows[2];
            for (int half = 0; half < 2; ++half) highs[half] = lows[half] = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int64_t g = 0; g < kFours; g += 2) {
                const __m512i key =
                    _mm512_permutexvar_epi64(spread, _mm512_castsi256_si512(_mm256_loadu_si256(places++)));
                const __m512i code = _mm512_permutexvar_epi64(turns, _mm512_loadu_si512(codes));
                codes += 2 * kTileRows;
                const __m512i high = in_turns(own.high[g]), low = in_turns(own.low[g]);
                add_pairs(_mm512_and_si512(code, nibble),
                          _mm512_and_si512(_mm512_srlv_epi16(key, lower_bits), two_bits), high, low, highs[0], lows[0]);
                add_pairs(_mm512_and_si512(_mm512_srli_epi16(code, 4), nibble),
                          _mm512_and_si512(_mm512_srlv_epi16(key, upper_bits), two_bits), high, low, highs[1], lows[1]);
            }
            const __m512 scale = _mm512_set1_ps(own.scale);
            for (int half = 0; half < 2; ++half) {
                const __m512i lower = _mm512_madd_epi16(_mm512_unpacklo_epi16(highs[half], lows[half]), weights);
                const __m512i upper = _mm512_madd_epi16(_mm512_unpackhi_epi16(highs[half], lows[half]), weights);
                sums[2 * half] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(lower), sums[2 * half]);
                sums[2 * half + 1] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(upper), sums[2 * half + 1]);
            }
        }
        const uint16_t* scale = p.scale + group * p.stored_rows + tile * kTileRows;
        for (int i = 0; i < 4; ++i)
            total[i] = _mm512_fmadd_ps(doubled_scales(scale + 16 * (i / 2) + 4 * (i % 2)), sums[i], total[i]);
    }
    for (int i = 0; i < 4; ++i) {
        float* to = out + 16 * (i / 2) + 4 * (i % 2);
        _mm_storeu_ps(to, _mm_add_ps(_mm512_castps512_ps128(total[i]), _mm512_extractf32x4_ps(total[i], 1)));
        _mm_storeu_ps(to + 8, _mm_add_ps(_mm512_extractf32x4_ps(total[i], 2), _mm512_extractf32x4_ps(total[i], 3)));
    }
}

}  // namespace niwaki

#endif
