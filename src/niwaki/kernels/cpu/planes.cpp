// Products with matrices stored as bit planes (codes.py: pack_planes), by tables: for every four columns of the input
// a table holds the sums of all 16 subsets, and one byte shuffle looks the sums of 32 rows up. A weight of K bits costs
// K/4 of a lookup, whatever its scales.
//
// Table entries are whole numbers of 13 bits with a scale for every 32 columns, so that eight of them add up in 16 bits
// without overflow; against float32 that costs about 3e-4 of the output's norm. All else is float32.

#include "kernels.h"

#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define NIWAKI_AVX2 1
#include <immintrin.h>
#endif

namespace niwaki {
namespace {

constexpr int64_t kTile = 32;       // rows of a tile
constexpr int64_t kBlockBytes = 4;  // bytes of planes (32 columns) that share a table scale
constexpr int64_t kBlockTables = 2 * kBlockBytes;
constexpr float kLargest = 4095;  // eight of them fit in 16 bits

// The tables of 32 columns: low bytes and high bytes of the 16 sums of every four columns.
struct BlockTables {
    uint8_t low[kBlockTables][16], high[kBlockTables][16];
    float scale, sum;
};

float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t exponent = (half >> 10) & 31, fraction = half & 1023;
    if (exponent == 0) {
        const float small = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -small : small;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

NIWAKI_MULTIVERSION
void fill_tables(const float* x, const int32_t* places, int64_t columns, int64_t blocks, BlockTables* tables) {
    for (int64_t block = 0; block < blocks; ++block) {
        float sums[kBlockTables][16], largest = 0, total = 0;
        for (int64_t t = 0; t < kBlockTables; ++t) {
            sums[t][0] = 0;
            for (int64_t i = 0; i < 4; ++i) {
                const int64_t column = (block * kBlockTables + t) * 4 + i;
                const float value = column < columns ? x[places ? places[column] : column] : 0;
                for (int64_t s = 0; s < 1 << i; ++s) sums[t][(1 << i) + s] = sums[t][s] + value;
            }
            for (float sum : sums[t]) largest = std::max(largest, std::fabs(sum));
            total += sums[t][15];
        }
        BlockTables& made = tables[block];
        made.sum = total;
        made.scale = largest / kLargest;
        const float inverse = largest > 0 ? kLargest / largest : 0;
        for (int64_t t = 0; t < kBlockTables; ++t)
            for (int64_t s = 0; s < 16; ++s) {
                const auto entry = static_cast<uint16_t>(static_cast<int16_t>(std::nearbyint(sums[t][s] * inverse)));
                made.low[t][s] = entry & 255, made.high[t][s] = entry >> 8;
            }
    }
}

// acc[32] += what the set bits of `bytes` bytes of one plane select, starting with the first byte of a block.
void sum_plane_portable(const uint8_t* plane, const BlockTables* tables, int64_t bytes, float* acc) {
    for (int64_t first = 0; first < bytes; first += kBlockBytes, ++tables)
        for (int64_t row = 0; row < kTile; ++row) {
            int32_t sum = 0;
            for (int64_t b = 0; b < std::min(kBlockBytes, bytes - first); ++b) {
                const uint8_t byte = plane[(first + b) * kTile + row];
                const int low = byte & 15, high = byte >> 4;
                sum += static_cast<int16_t>(tables->low[2 * b][low] | tables->high[2 * b][low] << 8);
                sum += static_cast<int16_t>(tables->low[2 * b + 1][high] | tables->high[2 * b + 1][high] << 8);
            }
            acc[row] += tables->scale * static_cast<float>(sum);
        }
}

#ifdef NIWAKI_AVX2
__attribute__((target("avx2,fma"))) inline __m256i both_halves(const uint8_t* table) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}

__attribute__((target("avx2,fma"))) inline __m256 widened(__m128i sums) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(sums));
}

// Adds what one byte of 32 rows selects. Unpacking bytes to 16 bits leaves rows 0-7 and 16-23 in `even`, the others
// in `odd`.
__attribute__((target("avx2,fma"))) inline void look_up(const uint8_t* plane, const BlockTables* tables, int i,
                                                        __m256i& even, __m256i& odd) {
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

__attribute__((target("avx2,fma")))
void sum_plane_avx2(const uint8_t* plane, const BlockTables* tables, int64_t bytes, float* acc) {
    __m256 a = _mm256_loadu_ps(acc), b = _mm256_loadu_ps(acc + 8);
    __m256 c = _mm256_loadu_ps(acc + 16), d = _mm256_loadu_ps(acc + 24);
    for (int64_t left = bytes; left > 0; left -= kBlockBytes, plane += kBlockBytes * kTile, ++tables) {
        __m256i even = _mm256_setzero_si256(), odd = even;
        look_up(plane, tables, 0, even, odd);
        if (left >= kBlockBytes) {
            look_up(plane + kTile, tables, 1, even, odd);
            look_up(plane + 2 * kTile, tables, 2, even, odd);
            look_up(plane + 3 * kTile, tables, 3, even, odd);
        } else {
            for (int i = 1; i < left; ++i) look_up(plane + i * kTile, tables, i, even, odd);
        }
        const __m256 scale = _mm256_set1_ps(tables->scale);
        a = _mm256_fmadd_ps(scale, widened(_mm256_castsi256_si128(even)), a);
        b = _mm256_fmadd_ps(scale, widened(_mm256_castsi256_si128(odd)), b);
        c = _mm256_fmadd_ps(scale, widened(_mm256_extracti128_si256(even, 1)), c);
        d = _mm256_fmadd_ps(scale, widened(_mm256_extracti128_si256(odd, 1)), d);
    }
    _mm256_storeu_ps(acc, a), _mm256_storeu_ps(acc + 8, b);
    _mm256_storeu_ps(acc + 16, c), _mm256_storeu_ps(acc + 24, d);
}
#endif

using SumPlane = void (*)(const uint8_t*, const BlockTables*, int64_t, float*);

SumPlane choose(bool portable) {
#ifdef NIWAKI_AVX2
    if (!portable && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return sum_plane_avx2;
#endif
    return sum_plane_portable;
}

void multiply_tile(const PlaneProduct& p, SumPlane sum_plane, const BlockTables* tables, int64_t tile, float* out) {
    const int64_t rows = std::min(kTile, p.rows - tile * kTile);
    for (int64_t group = 0; group < p.groups; ++group) {
        const int64_t first = group * p.group_bytes, count = std::min(p.group_bytes, p.bytes - first);
        const BlockTables* own = tables + first / kBlockBytes;
        float total[kTile] = {}, x_sum = 0;
        for (int64_t k = p.bits - 1; k >= 0; --k) {
            float acc[kTile] = {};
            sum_plane(p.planes + ((tile * p.bits + k) * p.bytes + first) * kTile, own, count, acc);
            for (int64_t row = 0; row < kTile; ++row) total[row] = 2 * total[row] + acc[row];
        }
        for (int64_t block = 0; block * kBlockBytes < count; ++block) x_sum += own[block].sum;
        const int64_t at = group * p.rows + tile * kTile;
        for (int64_t row = 0; row < rows; ++row) {
            const float scale = half_to_float(p.scale[at + row]);
            const float offset = p.offset ? half_to_float(p.offset[at + row])
                                          : -(p.zero ? static_cast<float>(p.zero[at + row]) : p.centre) * scale;
            out[row] += scale * total[row] + offset * x_sum;
        }
    }
}

}  // namespace

void plane_product(const PlaneProduct& p, int threads, bool portable) {
    const SumPlane sum_plane = choose(portable);
    const int64_t tiles = (p.rows + kTile - 1) / kTile, blocks = (p.bytes + kBlockBytes - 1) / kBlockBytes;
    std::vector<BlockTables> tables(p.tokens * blocks);
    for (int64_t n = 0; n < p.tokens; ++n) fill_tables(p.x + n * p.inputs, p.column, p.columns, blocks, &tables[n * blocks]);
    over_rows(tiles, threads, [&](int64_t first, int64_t last) {
        for (int64_t tile = first; tile < last; ++tile)
            for (int64_t n = 0; n < p.tokens; ++n)
                multiply_tile(p, sum_plane, &tables[n * blocks], tile, p.out + n * p.rows + tile * kTile);
    });
}

}  // namespace niwaki
