// Products with two-four matrices of 4-bit codes in tiles of 32 rows (sparse_tiles.py). For every four columns of the
// input a table of 16 bytes holds the four inputs; the indices of 32 values look theirs up with one byte shuffle, and one
// instruction multiplies them with the codes and adds the two of a row. About two instructions for eight weights.
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
#endif

namespace niwaki {
namespace {

constexpr int64_t kTile = 32, kBlock = 32, kFours = kBlock / 4;  // rows; columns with a scale, and groups of four in them
constexpr float kLargest = 8127;  // 63 · 128 + 63: high and low bytes are both signed

// The inputs of 32 columns. Of a half byte the lower two bits are the index of a row in the first half of the tile, the
// upper two of one in the second half; both look up the whole half byte.
struct Inputs {
    alignas(32) int8_t high[2][kFours][16], low[2][kFours][16];
    float scale;
};

void fill_inputs(const float* x, Inputs& made) {
    float largest = 0;
    for (int64_t i = 0; i < kBlock; ++i) largest = std::max(largest, std::fabs(x[i]));
    made.scale = largest / kLargest;
    const float inverse = largest > 0 ? kLargest / largest : 0;
    for (int64_t g = 0; g < kFours; ++g)
        for (int key = 0; key < 16; ++key)
            for (int half = 0; half < 2; ++half) {
                const int index = half ? key >> 2 : key & 3;
                const int whole = static_cast<int>(std::nearbyint(x[4 * g + index] * inverse));
                const int high = (whole + 64) >> 7;
                made.high[half][g][key] = static_cast<int8_t>(high);
                made.low[half][g][key] = static_cast<int8_t>(whole - 128 * high);
            }
    for (int64_t i = 0; i < kBlock; ++i)
        if (!std::isfinite(x[i])) made.scale = NAN;
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
                        const int key = places[i] >> (4 * (four & 1)) & 15;
                        const int code = ((codes[i] >> (4 * half) & 15) ^ 8) - 8;
                        total[16 * half + i / 2] +=
                            code * (128 * inputs[b].high[half][g][key] + inputs[b].low[half][g][key]);
                    }
            }
            for (int64_t r = 0; r < kTile; ++r) sums[r] += inputs[b].scale * static_cast<float>(total[r]);
        }
        scales_of(p.scale + group * p.stored_rows + tile * kTile, scale);
        for (int64_t r = 0; r < kTile; ++r) out[r] += scale[r] * sums[r];
    }
}

#ifdef NIWAKI_X86
NIWAKI_AVX2 inline __m256i both_halves(const int8_t* table) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}

// Adds the products of two values for each of 16 rows, high and low bytes of the inputs apart.
NIWAKI_AVX2 inline void add_pairs(__m256i codes, __m256i keys, const int8_t* high, const int8_t* low, __m256i& highs,
                                  __m256i& lows) {
    const __m256i sizes = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1));
    const __m256i signs =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1));
    const __m256i size = _mm256_shuffle_epi8(sizes, codes), sign = _mm256_shuffle_epi8(signs, codes);
    const __m256i high_x = _mm256_sign_epi8(_mm256_shuffle_epi8(both_halves(high), keys), sign);
    const __m256i low_x = _mm256_sign_epi8(_mm256_shuffle_epi8(both_halves(low), keys), sign);
    highs = _mm256_add_epi16(highs, _mm256_maddubs_epi16(size, high_x));
    lows = _mm256_add_epi16(lows, _mm256_maddubs_epi16(size, low_x));
}

// Scales of rows [first, first + 4) and [first + 8, first + 12), the order that unpacking leaves.
NIWAKI_AVX2 inline __m256 eight_scales(const uint16_t* from) {
    const __m128i lower = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const __m128i upper = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8));
    return _mm256_cvtph_ps(_mm_unpacklo_epi64(lower, upper));
}

NIWAKI_AVX2 void tile_avx2(const TileProduct& p, int64_t tile, const Inputs* inputs, float* out) {
    const __m256i nibble = _mm256_set1_epi8(15), weights = _mm256_set1_epi32(128 | 1 << 16);
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
                const __m256i keys[2] = {_mm256_and_si256(key, nibble),
                                         _mm256_and_si256(_mm256_srli_epi16(key, 4), nibble)};
                for (int i = 0; i < 2; ++i) {
                    const __m256i code = _mm256_loadu_si256(codes++);
                    const __m256i first = _mm256_and_si256(code, nibble);
                    const __m256i second = _mm256_and_si256(_mm256_srli_epi16(code, 4), nibble);
                    add_pairs(first, keys[i], own.high[0][g + i], own.low[0][g + i], highs[0], lows[0]);
                    add_pairs(second, keys[i], own.high[1][g + i], own.low[1][g + i], highs[1], lows[1]);
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
#endif

void scales_of(const uint16_t* halves, float* scale) {
    for (int64_t r = 0; r < kTile; ++r) scale[r] = half_to_float(halves[r]);
}

}  // namespace

void tile_product(const TileProduct& p, int threads, Path path) {
    auto tile_of = tile_portable;
#ifdef NIWAKI_X86
    if (path != Path::portable && supported(Path::avx2)) tile_of = tile_avx2;
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
