// Products with trellis-coded columns by AVX2. A byte shuffle looks up 16 levels, so that 16 of them serve all 256.

#include "trellis.h"

#ifdef NIWAKI_X86

namespace niwaki {
namespace {

// Brings the bits of 16 rows into words of 16 bits: `bytes` picks two bytes of the ring, and `factor` moves the state up
// to the high byte.
struct Places {
    __m256i bytes, factor;
};

NIWAKI_AVX2 Places places_of(int64_t bits, int64_t first_row) {
    alignas(32) uint8_t bytes[32];
    alignas(32) uint16_t factor[16];
    for (int64_t row = 0; row < 16; ++row) {
        const int64_t begin = (first_row + row) * bits, ring = 4 * bits;
        bytes[2 * row] = static_cast<uint8_t>(begin / 8), bytes[2 * row + 1] = static_cast<uint8_t>((begin / 8 + 1) % ring);
        factor[row] = static_cast<uint16_t>(256 >> begin % 8);
    }
    return {_mm256_load_si256(reinterpret_cast<const __m256i*>(bytes)),
            _mm256_load_si256(reinterpret_cast<const __m256i*>(factor))};
}

// The states of 16 rows as words.
NIWAKI_AVX2 inline __m256i states_of(__m256i ring, const Places& places) {
    return _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(ring, places.bytes), places.factor), 8);
}

// The 16 bytes from the beginning of a ring on, a copy where they would reach beyond the end of all rings.
NIWAKI_AVX2 inline __m256i load_ring(const uint8_t* ring, const uint8_t* end) {
    uint8_t last[16] = {};
    if (end - ring < 16) std::memcpy(last, ring, end - ring), ring = last;
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(ring)));
}

// The levels of 32 rows of a column. A shuffle gives zero for an index of 128 and more: that is every state outside of
// its 16 levels after a saturated addition.
NIWAKI_AVX2 inline __m256i look_up(__m256i ring, const Places* places, const __m256i* table) {
    const __m256i packed = _mm256_packus_epi16(states_of(ring, places[0]), states_of(ring, places[1]));
    const __m256i state = _mm256_permute4x64_epi64(packed, 0xD8);
    const __m256i least = _mm256_set1_epi8(0x70);
    __m256i level = _mm256_setzero_si256();
    for (int i = 0; i < 16; ++i) {
        const __m256i apart = _mm256_xor_si256(state, _mm256_set1_epi8(static_cast<char>(i << 4)));
        level = _mm256_or_si256(level, _mm256_shuffle_epi8(table[i], _mm256_adds_epu8(apart, least)));
    }
    return level;
}

NIWAKI_AVX2 inline __m256i added(__m256i sum, __m128i pairs, __m256i x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_cvtepi8_epi16(pairs), x));
}

// Adds the products with `kTokens` tokens: levels are looked up once for all of them.
template <int kTokens>
NIWAKI_AVX2 void multiply(const Places* places, const __m256i* table, const TrellisProduct& p, const uint8_t* rings,
                          const uint8_t* end, const TrellisInputs* inputs, float* sums) {
    const int64_t ring = 4 * p.bits, pairs = (p.columns + 1) / 2;
    for (int64_t first = 0, block = 0; first < pairs; first += kTrellisBlock / 2, ++block) {
        __m256i sum[kTokens][4] = {};
        for (int64_t pair = first; pair < std::min(pairs, first + kTrellisBlock / 2); ++pair) {
            const uint8_t* one = rings + 2 * pair * ring;
            const __m256i levels = look_up(load_ring(one, end), places, table);
            // The input of a missing last column is zero.
            const __m256i others =
                2 * pair + 1 < p.columns ? look_up(load_ring(one + ring, end), places, table) : _mm256_setzero_si256();
            const __m256i low = _mm256_unpacklo_epi8(levels, others), high = _mm256_unpackhi_epi8(levels, others);
            for (int n = 0; n < kTokens; ++n) {
                int32_t x_pair;
                std::memcpy(&x_pair, inputs[n].whole.data() + 2 * pair, 4);
                const __m256i x = _mm256_set1_epi32(x_pair);
                sum[n][0] = added(sum[n][0], _mm256_castsi256_si128(low), x);
                sum[n][1] = added(sum[n][1], _mm256_castsi256_si128(high), x);
                sum[n][2] = added(sum[n][2], _mm256_extracti128_si256(low, 1), x);
                sum[n][3] = added(sum[n][3], _mm256_extracti128_si256(high, 1), x);
            }
        }
        for (int n = 0; n < kTokens; ++n) {
            const __m256 scale = _mm256_set1_ps(inputs[n].scale[block]);
            for (int i = 0; i < 4; ++i) {
                float* at = sums + n * kRing + 8 * i;
                _mm256_storeu_ps(at, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[n][i]), scale, _mm256_loadu_ps(at)));
            }
        }
    }
}

}  // namespace

NIWAKI_AVX2 void trellis_tile_avx2(const TrellisProduct& p, const uint8_t* rings, const uint8_t* end,
                                   const TrellisInputs* inputs, float* sums) {
    const Places places[2] = {places_of(p.bits, 0), places_of(p.bits, 16)};
    __m256i table[16];
    for (int i = 0; i < 16; ++i)
        table[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p.levels + 16 * i)));
    int64_t n = 0;
    for (; n + 4 <= p.tokens; n += 4) multiply<4>(places, table, p, rings, end, inputs + n, sums + n * kRing);
    for (; n + 2 <= p.tokens; n += 2) multiply<2>(places, table, p, rings, end, inputs + n, sums + n * kRing);
    if (n < p.tokens) multiply<1>(places, table, p, rings, end, inputs + n, sums + n * kRing);
}

}  // namespace niwaki

#endif
