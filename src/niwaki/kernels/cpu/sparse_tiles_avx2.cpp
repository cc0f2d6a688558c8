// Products with tiles by AVX2: four columns of 32 rows per step.

#include "sparse_tiles.h"

#ifdef NIWAKI_X86

namespace niwaki {
namespace {

NIWAKI_AVX2 inline __m256i both_halves(const int8_t* table) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}

// Adds the products of two values for each of 16 rows, with separate sums for high and low bytes of the inputs.
NIWAKI_AVX2 inline void add_pairs(__m256i codes, __m256i index, const int8_t* high, const int8_t* low, __m256i& highs,
                                  __m256i& lows) {
    const __m256i key = _mm256_or_si256(index, _mm256_and_si256(codes, _mm256_set1_epi8(kNegative)));
    const __m256i size = _mm256_shuffle_epi8(both_halves(kSizes), codes);
    highs = _mm256_add_epi16(highs, _mm256_maddubs_epi16(size, _mm256_shuffle_epi8(both_halves(high), key)));
    lows = _mm256_add_epi16(lows, _mm256_maddubs_epi16(size, _mm256_shuffle_epi8(both_halves(low), key)));
}

}  // namespace

NIWAKI_AVX2 void tile_avx2(const TileProduct& p, int64_t tile, const BlockInputs* inputs, float* out) {
    const __m256i nibble = _mm256_set1_epi8(15), two_bits = _mm256_set1_epi8(kIndex);
    const __m256i weights = _mm256_set1_epi32(128 | 1 << 16);
    const int64_t fours = p.columns / 4;
    const auto* places = reinterpret_cast<const __m256i*>(p.places) + tile * fours / 2;
    const auto* codes = reinterpret_cast<const __m256i*>(p.codes) + tile * fours;
    __m256 total[4];
    for (__m256& eight : total) eight = _mm256_setzero_ps();
    for (int64_t group = 0; group * p.group < p.columns; ++group) {
        __m256 sums[4];
        for (__m256& eight : sums) eight = _mm256_setzero_ps();
        for (int64_t b = group * p.group / kInputBlock; b < std::min(p.columns, (group + 1) * p.group) / kInputBlock; ++b) {
            const BlockInputs& own = inputs[b];
            __m256i highs[2], lows[2];
            for (int half = 0; half < 2; ++half) highs[half] = lows[half] = _mm256_setzero_si256();
            for (int64_t g = 0; g < kFours; g += 2) {
                const __m256i key = _mm256_loadu_si256(places++);
#pragma GCC unroll 2
                for (int i = 0; i < 2; ++i) {
                    const __m256i index[2] = {_mm256_and_si256(_mm256_srli_epi16(key, 4 * i), two_bits),
                                              _mm256_and_si256(_mm256_srli_epi16(key, 4 * i + 2), two_bits)};
                    const __m256i code = _mm256_loadu_si256(codes++);
                    const __m256i first = _mm256_and_si256(code, nibble);
                    const __m256i second = _mm256_and_si256(_mm256_srli_epi16(code, 4), nibble);
                    add_pairs(first, index[0], own.high[g + i], own.low[g + i], highs[0], lows[0]);
                    add_pairs(second, index[1], own.high[g + i], own.low[g + i], highs[1], lows[1]);
                }
            }
            const __m256 scale = _mm256_set1_ps(own.scale);
            for (int half = 0; half < 2; ++half) {
                const __m256i lower = _mm256_madd_epi16(_mm256_unpacklo_epi16(highs[half], lows[half]), weights);
                const __m256i upper = _mm256_madd_epi16(_mm256_unpackhi_epi16(highs[half], lows[half]), weights);
                sums[2 * half] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(lower), sums[2 * half]);
                sums[2 * half + 1] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(upper), sums[2 * half + 1]);
            }
        }
        const uint16_t* scale = p.scale + group * p.stored_rows + tile * kTileRows;
        for (int i = 0; i < 4; ++i)
            total[i] = _mm256_fmadd_ps(eight_scales(scale + 16 * (i / 2) + 4 * (i % 2)), sums[i], total[i]);
    }
    for (int i = 0; i < 4; ++i) {
        float* to = out + 16 * (i / 2) + 4 * (i % 2);
        _mm_storeu_ps(to, _mm256_castps256_ps128(total[i]));
        _mm_storeu_ps(to + 8, _mm256_extractf128_ps(total[i], 1));
    }
}

}  // namespace niwaki

#endif
