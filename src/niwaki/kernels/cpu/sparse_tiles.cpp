// Products with two-four matrices of 4-bit codes in tiles of 32 rows (sparse_tiles.py). For every four columns of the
// input a table of 16 bytes holds the four inputs with either sign; index and sign of 32 or 64 values look theirs up with
// one byte shuffle, and one instruction multiplies them with the sizes of the codes and adds the two of a row.
//
// Inputs are whole numbers of 14 bits with a scale for every 32 columns, in two bytes: eight pairs of products add up in
// 16 bits without overflow; against float32 that costs about 1e-4 of the output's norm. All else is float32.

#include "kernels.h"

#include <cmath>
#include <memory>

#if defined(__x86_64__) && defined(__GNUC__)
#define NIWAKI_X86 1
#include <immintrin.h>
#define NIWAKI_AVX2 __attribute__((target("avx2,fma,f16c")))
#define NIWAKI_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw")))
#endif

namespace niwaki {
namespace {

constexpr int64_t kTile = 32, kBlock = 32, kFours = kBlock / 4;  // rows; columns with a scale, and groups of four in them
constexpr float kLargest = 8127;  // 63 · 128 + 63: high and low bytes are both signed

// The inputs of 32 columns: of four columns those at 0 to 3, and their opposites at kNegative and further.
struct Inputs {
    alignas(64) int8_t high[kFours][16], low[kFours][16];
    float scale;
};
constexpr int kIndex = 3, kNegative = 8;  // bits of a key: which of four, and the sign of a code

void fill_inputs(const float* x, Inputs& made) {
    float largest = 0;
    bool finite = true;
    for (int64_t i = 0; i < kBlock; ++i) {
        largest = std::max(largest, std::fabs(x[i]));
        finite &= std::isfinite(x[i]);
    }
    made.scale = finite ? largest / kLargest : NAN;
    const float inverse = finite && largest > 0 ? kLargest / largest : 0;
    std::memset(made.high, 0, sizeof made.high), std::memset(made.low, 0, sizeof made.low);
    for (int64_t i = 0; i < kBlock; ++i) {
        const int whole = static_cast<int>(std::nearbyint(finite ? x[i] * inverse : 0));
        const int high = (whole + 64) >> 7, low = whole - 128 * high;
        made.high[i / 4][i % 4] = static_cast<int8_t>(high), made.low[i / 4][i % 4] = static_cast<int8_t>(low);
        made.high[i / 4][kNegative + i % 4] = static_cast<int8_t>(-high);
        made.low[i / 4][kNegative + i % 4] = static_cast<int8_t>(-low);
    }
}

// Scales of 32 rows as float32.
void scales_of(const uint16_t* halves, float* scale);

// out[32] of one tile and one token.
void tile_portable(const TileProduct& p, int64_t tile, const Inputs* inputs, float* out) {
    const int64_t fours = p.columns / 4;
    std::fill_n(out, kTile, 0.0f);
    for (int64_t group = 0; group * p.group < p.columns; ++group) {
        float sums[kTile] = {}, scale[kTile];
        for (int64_t b = group * p.group / kBlock; b < std::min(p.columns, (group + 1) * p.group) / kBlock; ++b) {
            int32_t total[kTile] = {};
            for (int64_t g = 0; g < kFours; ++g) {
                const int64_t four = b * kFours + g;
                const uint8_t* places = p.places + (tile * fours / 2 + four / 2) * kTile;
                const uint8_t* codes = p.codes + (tile * fours + four) * kTile;
                for (int64_t i = 0; i < kTile; ++i)
                    for (int half = 0; half < 2; ++half) {
                        const int index = places[i] >> (4 * (four & 1) + 2 * half) & kIndex;
                        const int code = ((codes[i] >> (4 * half) & 15) ^ 8) - 8;
                        total[16 * half + i / 2] += code * (128 * inputs[b].high[g][index] + inputs[b].low[g][index]);
                    }
            }
            for (int64_t r = 0; r < kTile; ++r) sums[r] += inputs[b].scale * static_cast<float>(total[r]);
        }
        scales_of(p.scale + group * p.stored_rows + tile * kTile, scale);
        for (int64_t r = 0; r < kTile; ++r) out[r] += scale[r] * sums[r];
    }
}

#ifdef NIWAKI_X86
alignas(16) constexpr int8_t kSizes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1};  // of signed half bytes

NIWAKI_AVX2 inline __m256i both_halves(const int8_t* table) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}

// Adds the products of two values for each of 16 rows, high and low bytes of the inputs apart.
NIWAKI_AVX2 inline void add_pairs(__m256i codes, __m256i index, const int8_t* high, const int8_t* low, __m256i& highs,
                                  __m256i& lows) {
    const __m256i key = _mm256_or_si256(index, _mm256_and_si256(codes, _mm256_set1_epi8(kNegative)));
    const __m256i size = _mm256_shuffle_epi8(both_halves(kSizes), codes);
    highs = _mm256_add_epi16(highs, _mm256_maddubs_epi16(size, _mm256_shuffle_epi8(both_halves(high), key)));
    lows = _mm256_add_epi16(lows, _mm256_maddubs_epi16(size, _mm256_shuffle_epi8(both_halves(low), key)));
}

// Scales of rows [first, first + 4) and [first + 8, first + 12), the order that unpacking leaves.
NIWAKI_AVX2 inline __m256 eight_scales(const uint16_t* from) {
    const __m128i lower = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const __m128i upper = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8));
    return _mm256_cvtph_ps(_mm_unpacklo_epi64(lower, upper));
}

NIWAKI_AVX2 void tile_avx2(const TileProduct& p, int64_t tile, const Inputs* inputs, float* out) {
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
        for (int64_t b = group * p.group / kBlock; b < std::min(p.columns, (group + 1) * p.group) / kBlock; ++b) {
            const Inputs& own = inputs[b];
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
        const uint16_t* scale = p.scale + group * p.stored_rows + tile * kTile;
        for (int i = 0; i < 4; ++i)
            total[i] = _mm256_fmadd_ps(eight_scales(scale + 16 * (i / 2) + 4 * (i % 2)), sums[i], total[i]);
    }
    for (int i = 0; i < 4; ++i) {
        float* to = out + 16 * (i / 2) + 4 * (i % 2);
        _mm_storeu_ps(to, _mm256_castps256_ps128(total[i]));
        _mm_storeu_ps(to + 8, _mm256_extractf128_ps(total[i], 1));
    }
}

// Two tables of inputs for four columns each, in turns: lanes 0 and 2 belong to the first four columns.
NIWAKI_AVX512 inline __m512i in_turns(const int8_t* table) {
    return _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(table)));
}

// As of AVX2, of eight columns: what belongs to the first four is in lanes 0 (rows 0 to 7) and 2 (rows 8 to 15).
NIWAKI_AVX512 inline void add_pairs(__m512i codes, __m512i index, __m512i high, __m512i low, __m512i& highs,
                                    __m512i& lows) {
    constexpr int where_set = 0xca;  // of the third: the first where its bits are set, the second elsewhere
    const __m512i key = _mm512_ternarylogic_epi64(_mm512_set1_epi8(kNegative), codes, index, where_set);
    const __m512i sizes = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kSizes)));
    const __m512i size = _mm512_shuffle_epi8(sizes, codes);
    highs = _mm512_add_epi16(highs, _mm512_maddubs_epi16(size, _mm512_shuffle_epi8(high, key)));
    lows = _mm512_add_epi16(lows, _mm512_maddubs_epi16(size, _mm512_shuffle_epi8(low, key)));
}

// Scales as `eight_scales`, twice each.
NIWAKI_AVX512 inline __m512 doubled_scales(const uint16_t* from) {
    const __m256 eight = eight_scales(from);
    const __m512 lower = _mm512_castps128_ps512(_mm256_castps256_ps128(eight));
    const __m512 upper = _mm512_castps128_ps512(_mm256_extractf128_ps(eight, 1));
    return _mm512_shuffle_f32x4(lower, upper, 0);
}

NIWAKI_AVX512 void tile_avx512(const TileProduct& p, int64_t tile, const Inputs* inputs, float* out) {
    const __m512i nibble = _mm512_set1_epi8(15), two_bits = _mm512_set1_epi8(kIndex);
    const __m512i weights = _mm512_set1_epi32(128 | 1 << 16);
    const __m512i spread = _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), turns = _mm512_setr_epi64(0, 1, 4, 5, 2, 3, 6, 7);
    const __m512i lower_bits = _mm512_setr_epi64(0, 0, 0x0004000400040004, 0x0004000400040004, 0, 0, 0x0004000400040004,
                                                 0x0004000400040004);  // the second four lie in the upper half byte
    const __m512i upper_bits = _mm512_add_epi16(lower_bits, _mm512_set1_epi16(2));
    const int64_t fours = p.columns / 4;
    const auto* places = reinterpret_cast<const __m256i*>(p.places) + tile * fours / 2;
    const uint8_t* codes = p.codes + tile * fours * kTile;
    __m512 total[4];
    for (__m512& rows : total) rows = _mm512_setzero_ps();
    for (int64_t group = 0; group * p.group < p.columns; ++group) {
        __m512 sums[4];
        for (__m512& rows : sums) rows = _mm512_setzero_ps();
        for (int64_t b = group * p.group / kBlock; b < std::min(p.columns, (group + 1) * p.group) / kBlock; ++b) {
            const Inputs& own = inputs[b];
            __m512i highs[2], lows[2];
            for (int half = 0; half < 2; ++half) highs[half] = lows[half] = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int64_t g = 0; g < kFours; g += 2) {
                const __m512i key =
                    _mm512_permutexvar_epi64(spread, _mm512_castsi256_si512(_mm256_loadu_si256(places++)));
                const __m512i code = _mm512_permutexvar_epi64(turns, _mm512_loadu_si512(codes));
                codes += 2 * kTile;
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
        const uint16_t* scale = p.scale + group * p.stored_rows + tile * kTile;
        for (int i = 0; i < 4; ++i)
            total[i] = _mm512_fmadd_ps(doubled_scales(scale + 16 * (i / 2) + 4 * (i % 2)), sums[i], total[i]);
    }
    for (int i = 0; i < 4; ++i) {
        float* to = out + 16 * (i / 2) + 4 * (i % 2);
        _mm_storeu_ps(to, _mm_add_ps(_mm512_castps512_ps128(total[i]), _mm512_extractf32x4_ps(total[i], 1)));
        _mm_storeu_ps(to + 8, _mm_add_ps(_mm512_extractf32x4_ps(total[i], 2), _mm512_extractf32x4_ps(total[i], 3)));
    }
}
#endif

void scales_of(const uint16_t* halves, float* scale) {
    for (int64_t r = 0; r < kTile; ++r) scale[r] = half_to_float(halves[r]);
}

float put(float value, float*) { return value; }
uint16_t put(float value, uint16_t*) { return narrowed(value); }

// A row of the matrix; what a code stands for is looked up, of a group at a time.
template <typename T>
void decode_row(const TileProduct& p, int64_t row, T* out) {
    const int64_t fours = p.columns / 4, tile = row / kTile, half = row % kTile / 16, at = 2 * (row % 16);
    const uint8_t* places = p.places + tile * fours / 2 * kTile + at;
    const uint8_t* codes = p.codes + tile * fours * kTile + at;
    for (int64_t first = 0, group = 0; first < p.columns; first += p.group, ++group) {
        const float scale = half_to_float(p.scale[group * p.stored_rows + row]);
        T value[16];
        for (int code = 0; code < 16; ++code) value[code] = put(scale * static_cast<float>((code ^ 8) - 8), out);
        for (int64_t four = first / 4; four < std::min(p.columns, first + p.group) / 4; ++four) {
            const int shift = static_cast<int>(4 * (four & 1) + 2 * half);
            T* own = out + 4 * four;
            std::memset(own, 0, 4 * sizeof(T));
            for (int64_t i = 0; i < 2; ++i)
                own[places[four / 2 * kTile + i] >> shift & kIndex] = value[codes[four * kTile + i] >> (4 * half) & 15];
        }
    }
}

}  // namespace

void tile_decode(const TileProduct& p, const Decoded& to, int threads) {
    over_rows(to.last - to.first, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            if (to.bfloat16) decode_row(p, to.first + row, static_cast<uint16_t*>(to.out) + row * to.columns);
            else decode_row(p, to.first + row, static_cast<float*>(to.out) + row * to.columns);
    });
}

void tile_product(const TileProduct& p, int threads, Path path) {
    auto tile_of = tile_portable;
#ifdef NIWAKI_X86
    if (path != Path::portable && supported(Path::avx2)) tile_of = tile_avx2;
    if ((path == Path::best || path == Path::avx512) && supported(Path::avx512)) tile_of = tile_avx512;
#endif
    const int64_t blocks = p.columns / kBlock, tiles = p.stored_rows / kTile;
    const std::unique_ptr<Inputs[]> inputs(new Inputs[p.tokens * blocks]);
    for (int64_t n = 0; n < p.tokens; ++n)
        for (int64_t b = 0; b < blocks; ++b) fill_inputs(p.x + n * p.columns + b * kBlock, inputs[n * blocks + b]);
    over_rows(tiles, threads, [&](int64_t first, int64_t last) {
        for (int64_t tile = first; tile < last; ++tile)
            for (int64_t n = 0; n < p.tokens; ++n) {
                float own[kTile];
                tile_of(p, tile, &inputs[n * blocks], own);
                std::copy_n(own, std::min(kTile, p.rows - tile * kTile), p.out + n * p.rows + tile * kTile);
            }
    });
}

}  // namespace niwaki
