// Decoding of bit planes by GFNI and VBMI2: 32 columns of 8 rows at a time, into bfloat16. One instruction transposes the
// bits of 64 codes of up to four planes. A table of the levels of a row and group looks 32 weights up. A weight takes
// about a third of an instruction.

#include "planes_decode.h"

#ifdef NIWAKI_X86

namespace niwaki {
namespace {

constexpr int64_t kTile = 32;  // rows of a tile
constexpr int64_t kMaxBits = 4;  // 16 levels are half of the table of a lookup

// Rounds to the nearest bfloat16 as `narrowed` does, for finite values.
NIWAKI_GFNI inline __m256i narrowed_16(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

// The levels of the rows of a tile in a group, 16 per row.
struct Levels {
    alignas(64) uint16_t of[kTile + 1][16];  // a lookup reads 32 and uses the lower 16
};

NIWAKI_GFNI void fill_levels(const PlaneProduct& p, int64_t at, int64_t rows, Levels& made) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t first = 0; first < rows; first += 16) {
        const auto here = static_cast<__mmask16>(rows - first >= 16 ? 0xffff : (1 << (rows - first)) - 1);
        const __m512 scale = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(here, p.scale + at + first));
        __m512 offset;
        if (p.offset) {
            offset = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(here, p.offset + at + first));
        } else {
            __m512 zero = _mm512_set1_ps(p.centre);
            if (p.zero)
                zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(here, p.zero + at + first)));
            offset = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(zero, scale));
        }
        alignas(64) float scales[16], offsets[16];
        _mm512_store_ps(scales, scale), _mm512_store_ps(offsets, offset);
        for (int64_t row = 0; row < std::min<int64_t>(16, rows - first); ++row) {
            const __m512 values = _mm512_fmadd_ps(codes, _mm512_set1_ps(scales[row]), _mm512_set1_ps(offsets[row]));
            _mm256_store_si256(reinterpret_cast<__m256i*>(made.of[first + row]), narrowed_16(values));
        }
    }
}

NIWAKI_GFNI inline __m128i eight_rows(const uint8_t* plane) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(plane));
}

// Returns the codes of a byte of columns in eight rows, 64 bits per row. The planes are the bits of the transposed matrix.
NIWAKI_GFNI inline __m512i eight_codes(const uint8_t* planes, int64_t stride, int64_t bits) {
    const __m128i none = _mm_setzero_si128();
    const __m128i p_0 = eight_rows(planes), p_1 = bits > 1 ? eight_rows(planes + stride) : none;
    const __m128i p_2 = bits > 2 ? eight_rows(planes + 2 * stride) : none;
    const __m128i p_3 = bits > 3 ? eight_rows(planes + 3 * stride) : none;
    const __m128i low = _mm_unpacklo_epi8(p_1, p_0), high = _mm_unpacklo_epi8(p_3, p_2);
    const __m256i four =
        _mm256_set_m128i(_mm_unpackhi_epi16(high, low), _mm_unpacklo_epi16(high, low));  // p_3, p_2, p_1, p_0
    const __m512i matrix = _mm512_slli_epi64(_mm512_cvtepu32_epi64(four), 32);  // its last byte becomes the lowest bits
    return _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201u)), matrix, 0);
}

NIWAKI_GFNI inline void put_weights(__m256i codes, const uint16_t* levels, __mmask32 here, uint16_t* out) {
    const __m512i weights = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), _mm512_loadu_si512(levels));
    _mm512_mask_storeu_epi16(out, here, weights);
}

// Writes the columns of one part for the rows of a tile: [rows, stride] in bfloat16.
NIWAKI_GFNI void decode_tile(const PlaneProduct& p, int64_t tile, int64_t rows, uint16_t* out, int64_t stride) {
    const uint8_t* planes = p.planes + tile * p.bits * p.bytes * kTile;
    const __m512i first_two = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i last_two = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    Levels levels{};
    for (int64_t group = 0; group < p.groups; ++group) {
        fill_levels(p, group * p.rows + tile * kTile, rows, levels);
        const int64_t end = std::min(p.bytes, (group + 1) * p.group_bytes);
        for (int64_t b = group * p.group_bytes; b < end; b += 4) {
            const int64_t count = std::min<int64_t>({32, 8 * (end - b), p.columns - 8 * b});
            const auto here = static_cast<__mmask32>((uint64_t{1} << count) - 1);
            for (int64_t row = 0; row < rows; row += 8) {
                __m512i codes[4];
                for (int64_t j = 0; j < 4; ++j)
                    codes[j] = b + j < end
                        ? eight_codes(planes + (b + j) * kTile + row, p.bytes * kTile, p.bits)
                        : _mm512_setzero_si512();
                const __m512i even = _mm512_unpacklo_epi64(codes[0], codes[1]);
                const __m512i odd = _mm512_unpackhi_epi64(codes[0], codes[1]);
                const __m512i even_2 = _mm512_unpacklo_epi64(codes[2], codes[3]);
                const __m512i odd_2 = _mm512_unpackhi_epi64(codes[2], codes[3]);
                const __m512i pairs[4] = {
                    _mm512_permutex2var_epi64(even, first_two, even_2), _mm512_permutex2var_epi64(odd, first_two, odd_2),
                    _mm512_permutex2var_epi64(even, last_two, even_2), _mm512_permutex2var_epi64(odd, last_two, odd_2),
                };  // rows 0 and 2, 1 and 3, 4 and 6, 5 and 7
                for (int64_t i = 0; i < std::min<int64_t>(8, rows - row); ++i) {
                    const __m512i both = pairs[i / 4 * 2 + i % 2];
                    const __m256i own = i % 4 < 2 ? _mm512_castsi512_si256(both) : _mm512_extracti64x4_epi64(both, 1);
                    put_weights(own, levels.of[row + i], here, out + (row + i) * stride + 8 * b);
                }
            }
        }
    }
}

// Positions of the columns of a part: a mask of every 32 columns of the matrix, and the number of columns before them.
struct Places {
    bool ascending = true;
    std::vector<uint32_t> masks;
    std::vector<int32_t> before;
};

Places places_of(const PlaneProduct& p, int64_t columns) {
    Places found;
    found.masks.resize((columns + 31) / 32), found.before.resize(found.masks.size());
    for (int64_t i = 0; i < p.columns; ++i) {
        found.ascending = found.ascending && (i == 0 || p.column[i - 1] < p.column[i]);
        found.masks[p.column[i] / 32] |= uint32_t{1} << p.column[i] % 32;
    }
    for (size_t i = 1; i < found.masks.size(); ++i)
        found.before[i] = found.before[i - 1] + __builtin_popcount(found.masks[i - 1]);
    return found;
}

// Copies the consecutive weights of a part to their columns of a row. It may read 32 weights after the last one.
NIWAKI_GFNI void put_apart(const PlaneProduct& p, const Places& places, const uint16_t* own, uint16_t* out) {
    if (!places.ascending) {
        for (int64_t i = 0; i < p.columns; ++i) out[p.column[i]] = own[i];
        return;
    }
    for (size_t i = 0; i < places.masks.size(); ++i) {
        __m512i next = _mm512_loadu_si512(own + places.before[i]);
        asm("" : "+v"(next));  // keeps the load apart: AMD runs the expansion of a memory operand from microcode
        const __m512i weights = _mm512_maskz_expand_epi16(places.masks[i], next);
        _mm512_mask_storeu_epi16(out + 32 * i, places.masks[i], weights);
    }
}

// Decodes the tiles [first, last).
void decode_tiles(const std::vector<PlaneProduct>& parts, const std::vector<Places>& places, const Decoded& to,
                  int64_t first, int64_t last) {
    std::vector<uint16_t> own;
    for (int64_t tile = first; tile < last; ++tile) {
        const int64_t begin = tile * kTile, rows = std::min(kTile, to.last - begin);
        uint16_t* out = static_cast<uint16_t*>(to.out) + (begin - to.first) * to.columns;
        for (size_t i = 0; i < parts.size(); ++i) {
            const PlaneProduct& p = parts[i];
            if (!p.column) {
                decode_tile(p, tile, rows, out, to.columns);
                continue;
            }
            own.resize(kTile * p.columns + 32);
            decode_tile(p, tile, rows, own.data(), p.columns);
            for (int64_t row = 0; row < rows; ++row)
                put_apart(p, places[i], own.data() + row * p.columns, out + row * to.columns);
        }
    }
}

}  // namespace

bool takes_gfni(const std::vector<PlaneProduct>& parts, const Decoded& to, Path path) {
    if ((path != Path::best && path != Path::gfni) || !supported(Path::gfni)) return false;
    for (const PlaneProduct& p : parts)
        if (p.bits > kMaxBits) return false;
    return to.bfloat16 && to.first % kTile == 0;
}

void plane_decode_gfni(const std::vector<PlaneProduct>& parts, const Decoded& to, int threads) {
    const int64_t first = to.first / kTile, tiles = (to.last + kTile - 1) / kTile - first;
    std::vector<Places> places;
    for (const PlaneProduct& p : parts) places.push_back(p.column ? places_of(p, to.columns) : Places{});
    over_rows(tiles, threads, [&](int64_t begin, int64_t end) {
        decode_tiles(parts, places, to, first + begin, first + end);
    });
}

}  // namespace niwaki

#endif
