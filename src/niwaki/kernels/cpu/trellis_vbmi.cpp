// Trellis-coded columns by AVX-512 with VBMI and VNNI, four of them at a time. Shuffles and multishifts bring 16 rows of
// four columns into their 64 states, and shuffles of 128 bytes look up the levels. So the four levels of a row lie side by
// side: for products of bytes, and for rows of a decoded matrix.

#include "trellis.h"

#ifdef NIWAKI_X86

namespace niwaki {
namespace {

// `bytes` picks the bits of each 64-bit word from the rings of four columns, and `shifts` begins each state at the bits of
// its row. Of 1, 2 and 4 bits a word holds two rows of four columns, 16 bits each; the second pair has the last 16 rows.
// Of 3 bits that is one bit too few: a word holds four rows of two columns, and the pairs are those of the columns.
struct Places {
    alignas(64) uint8_t bytes[2][64], shifts[2][64];
};

Places places_of(int64_t bits) {
    Places made;
    const int64_t ring = 4 * bits;
    for (int64_t half = 0; half < 2; ++half)
        for (int64_t word = 0; word < 8; ++word)
            for (int64_t i = 0; i < 8; ++i) {
                uint8_t &byte = made.bytes[half][8 * word + i], &shift = made.shifts[half][8 * word + i];
                if (bits == 3) {
                    // Unpacking takes the even words of both pairs to the first 16 rows, and the odd ones to the last.
                    const int64_t begin = (16 * (word % 2) + 4 * (word / 2)) * bits;
                    byte = static_cast<uint8_t>((begin / 8 + i % 4) % ring + (2 * half + i / 4) * ring);
                    shift = static_cast<uint8_t>(begin % 8 + i / 2 * bits + i % 2 * 32);
                } else {
                    const int64_t begin = (16 * half + 2 * word) * bits;
                    byte = static_cast<uint8_t>((begin / 8 + i % 2) % ring + i / 2 * ring);
                    shift = static_cast<uint8_t>(begin % 8 + i / 4 * bits + i % 4 * 16);
                }
            }
    return made;
}

// Levels of 32 rows and four columns: a word of 32 bits has those of one row, the first 16 rows come in `rows[0]`.
struct Quad {
    __m512i rows[2];
};

// Reader of the rings of a part. Levels are those of the part, each xor `flip`.
struct Reader {
    __m512i bytes[2], shifts[2], levels[4];
    int64_t bits;

    NIWAKI_VBMI Reader(const TrellisProduct& p, char flip) : bits(p.bits) {
        const Places places = places_of(p.bits);
        for (int i = 0; i < 2; ++i) {
            bytes[i] = _mm512_load_si512(places.bytes[i]);
            shifts[i] = _mm512_load_si512(places.shifts[i]);
        }
        for (int i = 0; i < 4; ++i)
            levels[i] = _mm512_xor_si512(_mm512_loadu_si512(p.levels + 64 * i), _mm512_set1_epi8(flip));
    }

    NIWAKI_VBMI __m512i look_up(__m512i own, int half) const {
        const __m512i state = _mm512_multishift_epi64_epi8(shifts[half], _mm512_permutexvar_epi8(bytes[half], own));
        const __m512i below = _mm512_permutex2var_epi8(levels[0], state, levels[1]);
        const __m512i above = _mm512_permutex2var_epi8(levels[2], state, levels[3]);
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(state), below, above);
    }

    // Reads `count` rings of one to four columns, and no byte after them.
    NIWAKI_VBMI Quad read(const uint8_t* rings, int64_t count) const {
        const __mmask64 loaded = ~uint64_t{0} >> (64 - 4 * bits * count);
        const __m512i own = _mm512_maskz_loadu_epi8(loaded, rings);
        const __m512i one = look_up(own, 0), other = look_up(own, 1);
        if (bits != 3) return {{one, other}};
        return {{_mm512_unpacklo_epi16(one, other), _mm512_unpackhi_epi16(one, other)}};
    }
};

// Transposes 4 × 4 words of 32 bits in every 128 bits: the sixteen levels of row 4 · l + i come to the place l of own[i].
NIWAKI_VBMI inline void rows_of(const __m512i quads[4], __m512i own[4]) {
    const __m512i a = _mm512_unpacklo_epi32(quads[0], quads[1]), b = _mm512_unpackhi_epi32(quads[0], quads[1]);
    const __m512i c = _mm512_unpacklo_epi32(quads[2], quads[3]), d = _mm512_unpackhi_epi32(quads[2], quads[3]);
    own[0] = _mm512_unpacklo_epi64(a, c), own[1] = _mm512_unpackhi_epi64(a, c);
    own[2] = _mm512_unpacklo_epi64(b, d), own[3] = _mm512_unpackhi_epi64(b, d);
}

// Adds the products with `kTokens` tokens: levels are looked up once for all of them.
template <int kTokens>
NIWAKI_VBMI void multiply(const Reader& reader, const TrellisProduct& p, const uint8_t* rings, const TrellisInputs* inputs,
                          float* sums) {
    const int64_t ring = 4 * p.bits;
    for (int64_t first = 0, block = 0; first < p.columns; first += kTrellisBlock, ++block) {
        __m512i upper[kTokens][2] = {}, lower[kTokens][2] = {};
        const int64_t last = std::min(p.columns, first + kTrellisBlock);
        for (int64_t column = first; column < last; column += 4) {
            const Quad quad = reader.read(rings + column * ring, std::min<int64_t>(4, last - column));
            for (int n = 0; n < kTokens; ++n) {
                int32_t high_bytes, low_bytes;
                std::memcpy(&high_bytes, inputs[n].high.data() + column, 4);
                std::memcpy(&low_bytes, inputs[n].low.data() + column, 4);
                for (int i = 0; i < 2; ++i) {
                    upper[n][i] = _mm512_dpbusd_epi32(upper[n][i], quad.rows[i], _mm512_set1_epi32(high_bytes));
                    lower[n][i] = _mm512_dpbusd_epi32(lower[n][i], quad.rows[i], _mm512_set1_epi32(low_bytes));
                }
            }
        }
        // Sums wrap around on the way and are whole in the end, since the sum of the products fits in 32 bits.
        for (int n = 0; n < kTokens; ++n)
            for (int i = 0; i < 2; ++i) {
                const __m512i bytes = _mm512_add_epi32(_mm512_slli_epi32(upper[n][i], 8), lower[n][i]);
                const __m512i whole = _mm512_sub_epi32(bytes, _mm512_set1_epi32(inputs[n].sum[block] * 128));
                float* at = sums + n * kRing + 16 * i;
                const __m512 scale = _mm512_set1_ps(inputs[n].scale[block]);
                _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scale, _mm512_loadu_ps(at)));
            }
    }
}

}  // namespace

NIWAKI_VBMI void trellis_tile_vbmi(const TrellisProduct& p, const uint8_t* rings, const uint8_t*,
                                   const TrellisInputs* inputs, float* sums) {
    const Reader reader(p, static_cast<char>(0x80));  // bytes without a sign: level + 128
    int64_t n = 0;
    for (; n + 4 <= p.tokens; n += 4) multiply<4>(reader, p, rings, inputs + n, sums + n * kRing);
    if (p.tokens - n == 3) multiply<3>(reader, p, rings, inputs + n, sums + n * kRing);
    if (p.tokens - n == 2) multiply<2>(reader, p, rings, inputs + n, sums + n * kRing);
    if (p.tokens - n == 1) multiply<1>(reader, p, rings, inputs + n, sums + n * kRing);
}

NIWAKI_VBMI void trellis_decode_vbmi(const TrellisProduct& p, const uint8_t* rings, const float* scale, float* own,
                                     int64_t stride) {
    const Reader reader(p, 0);
    const int64_t ring = 4 * p.bits;
    for (int64_t first = 0; first < p.columns; first += kTogether) {
        const int64_t count = std::min(kTogether, p.columns - first);
        __m512i quads[2][4] = {};
        for (int64_t quad = 0; 4 * quad < count; ++quad) {
            const Quad read = reader.read(rings + (first + 4 * quad) * ring, std::min<int64_t>(4, count - 4 * quad));
            quads[0][quad] = read.rows[0], quads[1][quad] = read.rows[1];
        }
        const bool whole = !p.column && count == kTogether;
        alignas(64) float some[kRing][kTogether];
        for (int64_t half = 0; half < 2; ++half) {
            __m512i words[4];
            rows_of(quads[half], words);
            for (int64_t i = 0; i < 4; ++i) {
                alignas(64) int8_t levels[64];
                _mm512_store_si512(levels, words[i]);
                for (int64_t place = 0; place < 4; ++place) {
                    const int64_t row = 16 * half + 4 * place + i;
                    const __m128i level = _mm_load_si128(reinterpret_cast<const __m128i*>(levels + 16 * place));
                    const __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(level));
                    float* at = whole ? own + row * stride + first : some[row];
                    _mm512_storeu_ps(at, _mm512_mul_ps(value, _mm512_set1_ps(scale[row])));
                }
            }
        }
        if (!whole) put_columns(p, some, first, count, own, stride);
    }
}

}  // namespace niwaki

#endif
