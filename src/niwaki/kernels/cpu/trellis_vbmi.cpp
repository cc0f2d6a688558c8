// Products with trellis-coded columns by AVX-512 with VBMI and VNNI. One shuffle brings the bits of two columns and 32
// rows into place, one multishift makes their 64 states, and two shuffles of 128 bytes look up the levels.

#include "trellis.h"

#ifdef NIWAKI_X86

namespace niwaki {
namespace {

// A word holds four rows of two columns: 32 bits of the first one, then 32 bits of the second one. `bytes` picks them
// from the rings of both columns, and `shifts` begins each state at the bits of its row.
struct Places {
    alignas(64) uint8_t bytes[64], shifts[64];
};

Places places_of(int64_t bits) {
    Places made;
    for (int64_t word = 0; word < 8; ++word)
        for (int64_t i = 0; i < 8; ++i) {
            const int64_t begin = 4 * word * bits, own = (begin / 8 + i % 4) % (4 * bits);
            made.bytes[8 * word + i] = static_cast<uint8_t>(own + i / 4 * 4 * bits);
            made.shifts[8 * word + i] = static_cast<uint8_t>(begin % 8 + i / 2 * bits + i % 2 * 32);
        }
    return made;
}

}  // namespace

NIWAKI_VBMI void trellis_tile_vbmi(const TrellisProduct& p, const uint8_t* rings, const uint8_t*,
                                   const TrellisInputs& inputs, float* sums) {
    const Places places = places_of(p.bits);
    const __m512i bytes = _mm512_load_si512(places.bytes), shifts = _mm512_load_si512(places.shifts);
    const __m512i level_0 = _mm512_loadu_si512(p.levels), level_1 = _mm512_loadu_si512(p.levels + 64);
    const __m512i level_2 = _mm512_loadu_si512(p.levels + 128), level_3 = _mm512_loadu_si512(p.levels + 192);
    const int64_t pair_bytes = 8 * p.bits, pairs = (p.columns + 1) / 2;
    const __mmask32 loaded = static_cast<__mmask32>((uint64_t{1} << pair_bytes) - 1);
    __m512 low = _mm512_loadu_ps(sums), high = _mm512_loadu_ps(sums + 16);
    for (int64_t first = 0, block = 0; first < pairs; first += kTrellisBlock / 2, ++block) {
        __m512i sum_low = _mm512_setzero_si512(), sum_high = sum_low;
        for (int64_t pair = first; pair < std::min(pairs, first + kTrellisBlock / 2); ++pair) {
            // A last column alone reads no bytes after its ring, and the input of the missing one is zero.
            const bool alone = 2 * pair + 1 == p.columns;
            const __m256i own =
                _mm256_maskz_loadu_epi8(alone ? loaded >> (pair_bytes / 2) : loaded, rings + pair * pair_bytes);
            const __m512i words = _mm512_permutexvar_epi8(bytes, _mm512_castsi256_si512(own));
            const __m512i state = _mm512_multishift_epi64_epi8(shifts, words);
            const __m512i below = _mm512_permutex2var_epi8(level_0, state, level_1);
            const __m512i above = _mm512_permutex2var_epi8(level_2, state, level_3);
            const __m512i level = _mm512_mask_blend_epi8(_mm512_movepi8_mask(state), below, above);
            int32_t x_pair;
            std::memcpy(&x_pair, inputs.whole.data() + 2 * pair, 4);
            const __m512i x = _mm512_set1_epi32(x_pair);
            const __m512i first_rows = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(level));
            const __m512i last_rows = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(level, 1));
            sum_low = _mm512_dpwssd_epi32(sum_low, first_rows, x);
            sum_high = _mm512_dpwssd_epi32(sum_high, last_rows, x);
        }
        const __m512 scale = _mm512_set1_ps(inputs.scale[block]);
        low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum_low), scale, low);
        high = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum_high), scale, high);
    }
    _mm512_storeu_ps(sums, low), _mm512_storeu_ps(sums + 16, high);
}

}  // namespace niwaki

#endif
