// Products with matrices stored as bit planes (codes.py: pack_planes), by tables: for every four columns of the input
// a table holds the sums of all 16 subsets, and one byte shuffle looks the sums of 32 rows up. A weight of K bits costs
// K/4 of a lookup, whatever its scales.
//
// Table entries are whole numbers of 13 bits with a scale for every 32 columns, so that eight of them add up in 16 bits
// without overflow; against float32 that costs about 3e-4 of the output's norm. All else is float32.
//
// Three paths with the same sums: AVX-512 (two bytes of 32 rows a shuffle), AVX2 (one), and portable code.

#include "kernels.h"

#include <cmath>
#include <cstring>
#include <memory>

#if defined(__x86_64__) && defined(__GNUC__)
#define NIWAKI_X86 1
#include <immintrin.h>
#define NIWAKI_AVX2 __attribute__((target("avx2,fma")))
#define NIWAKI_F16C __attribute__((target("avx2,fma,f16c")))
#define NIWAKI_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw")))
#endif

namespace niwaki {
namespace {

constexpr int64_t kTile = 32;       // rows of a tile
constexpr int64_t kBlockBytes = 4;  // bytes of planes (32 columns) that share a table scale
constexpr int64_t kBlockTables = 2 * kBlockBytes;
constexpr float kLargest = 4095;  // eight of them fit in 16 bits

// The tables of 32 columns: low bytes and high bytes of the 16 sums of every four columns.
struct BlockTables {
    alignas(64) uint8_t low[kBlockTables][16], high[kBlockTables][16];
    float scale, sum;
};

// The 32 inputs of a block, zero where there is no column.
void gather(const float* x, const int32_t* places, int64_t first, int64_t columns, float* values) {
    for (int64_t i = 0; i < 8 * kBlockBytes; ++i) {
        const int64_t column = first + i;
        values[i] = column < columns ? x[places ? places[column] : column] : 0;
    }
}

void fill_block_portable(const float* values, BlockTables& made) {
    float sums[kBlockTables][16], largest = 0;
    made.sum = 0;
    for (int64_t t = 0; t < kBlockTables; ++t) {
        sums[t][0] = 0;
        for (int64_t i = 0; i < 4; ++i)
            for (int64_t s = 0; s < 1 << i; ++s) sums[t][(1 << i) + s] = sums[t][s] + values[4 * t + i];
        for (float sum : sums[t]) largest = std::max(largest, std::fabs(sum));
        made.sum += sums[t][15];
    }
    made.scale = largest / kLargest;
    const float inverse = largest > 0 ? kLargest / largest : 0;
    for (int64_t t = 0; t < kBlockTables; ++t)
        for (int64_t s = 0; s < 16; ++s) {
            const auto entry = static_cast<uint16_t>(static_cast<int16_t>(std::nearbyint(sums[t][s] * inverse)));
            made.low[t][s] = entry & 255, made.high[t][s] = entry >> 8;
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

#ifdef NIWAKI_X86
// Entry s of a table holds its inputs i where s has bit i: the eight low entries, then the eight high ones.
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
    made.scale = largest / kLargest;
    const __m256 inverse = _mm256_set1_ps(largest > 0 ? kLargest / largest : 0);
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

NIWAKI_AVX2 inline __m256 widened(__m128i sums) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(sums));
}

// Adds what one byte of 32 rows selects. Unpacking bytes to 16 bits leaves rows 0-7 and 16-23 in `even`, the others
// in `odd`.
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

// The sums of 32 rows, in registers.
struct Rows {
    __m256 a, b, c, d;
};

NIWAKI_AVX2 inline Rows load(const float* acc) {
    return {_mm256_loadu_ps(acc), _mm256_loadu_ps(acc + 8), _mm256_loadu_ps(acc + 16), _mm256_loadu_ps(acc + 24)};
}

NIWAKI_AVX2 inline void store(const Rows& rows, float* acc) {
    _mm256_storeu_ps(acc, rows.a), _mm256_storeu_ps(acc + 8, rows.b);
    _mm256_storeu_ps(acc + 16, rows.c), _mm256_storeu_ps(acc + 24, rows.d);
}

// Adds the sums of a block, as `look_up` left them.
NIWAKI_AVX2 inline void add_block(__m256i even, __m256i odd, float block_scale, Rows& rows) {
    const __m256 scale = _mm256_set1_ps(block_scale);
    rows.a = _mm256_fmadd_ps(scale, widened(_mm256_castsi256_si128(even)), rows.a);
    rows.b = _mm256_fmadd_ps(scale, widened(_mm256_castsi256_si128(odd)), rows.b);
    rows.c = _mm256_fmadd_ps(scale, widened(_mm256_extracti128_si256(even, 1)), rows.c);
    rows.d = _mm256_fmadd_ps(scale, widened(_mm256_extracti128_si256(odd, 1)), rows.d);
}

NIWAKI_AVX2 void sum_plane_avx2(const uint8_t* plane, const BlockTables* tables, int64_t bytes, float* acc) {
    Rows rows = load(acc);
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
        add_block(even, odd, tables->scale, rows);
    }
    store(rows, acc);
}

// Adds what two bytes of 32 rows select: the first byte's sums in the lower half, the second's in the upper.
NIWAKI_AVX512 inline void look_up_two(const uint8_t* plane, const BlockTables* tables, int i, __m512i& even,
                                      __m512i& odd) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i rows = _mm512_loadu_si512(plane);
    const __m512i low = _mm512_load_si512(tables->low[2 * i]), high = _mm512_load_si512(tables->high[2 * i]);
    const __m512i first = _mm512_and_si512(rows, nibble);
    const __m512i second = _mm512_and_si512(_mm512_srli_epi16(rows, 4), nibble);
    // Of the four tables: 0 and 2 are those of the low nibbles, 1 and 3 of the high ones.
    const __m512i low_1 = _mm512_shuffle_epi8(_mm512_shuffle_i64x2(low, low, 0xA0), first);
    const __m512i high_1 = _mm512_shuffle_epi8(_mm512_shuffle_i64x2(high, high, 0xA0), first);
    const __m512i low_2 = _mm512_shuffle_epi8(_mm512_shuffle_i64x2(low, low, 0xF5), second);
    const __m512i high_2 = _mm512_shuffle_epi8(_mm512_shuffle_i64x2(high, high, 0xF5), second);
    even = _mm512_add_epi16(even, _mm512_unpacklo_epi8(low_1, high_1));
    odd = _mm512_add_epi16(odd, _mm512_unpackhi_epi8(low_1, high_1));
    even = _mm512_add_epi16(even, _mm512_unpacklo_epi8(low_2, high_2));
    odd = _mm512_add_epi16(odd, _mm512_unpackhi_epi8(low_2, high_2));
}

NIWAKI_AVX512 inline __m256i folded(__m512i sums) {
    return _mm256_add_epi16(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
}

NIWAKI_AVX512 void sum_plane_avx512(const uint8_t* plane, const BlockTables* tables, int64_t bytes, float* acc) {
    Rows rows = load(acc);
    int64_t left = bytes;
    for (; left >= kBlockBytes; left -= kBlockBytes, plane += kBlockBytes * kTile, ++tables) {
        __m512i even = _mm512_setzero_si512(), odd = even;
        look_up_two(plane, tables, 0, even, odd);
        look_up_two(plane + 2 * kTile, tables, 2, even, odd);
        add_block(folded(even), folded(odd), tables->scale, rows);
    }
    store(rows, acc);
    if (left) sum_plane_avx2(plane, tables, left, acc);
}
#endif

// Rows of one group: out += scale · total + offset · x_sum, from float16 and zero codes as they are stored.
void finish_portable(const PlaneProduct& p, int64_t at, int64_t rows, const float* total, float x_sum, float* out) {
    for (int64_t row = 0; row < rows; ++row) {
        const float scale = half_to_float(p.scale[at + row]);
        const float offset = p.offset ? half_to_float(p.offset[at + row])
                                      : -(p.zero ? static_cast<float>(p.zero[at + row]) : p.centre) * scale;
        out[row] += scale * total[row] + offset * x_sum;
    }
}

#ifdef NIWAKI_X86
NIWAKI_F16C inline __m256 eight_halves(const uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

NIWAKI_F16C void finish_f16c(const PlaneProduct& p, int64_t at, int64_t rows, const float* total, float x_sum,
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
    if (whole < rows) finish_portable(p, at + whole, rows - whole, total + whole, x_sum, out + whole);
}
#endif

struct Kernels {
    void (*fill_block)(const float*, BlockTables&);
    void (*sum_plane)(const uint8_t*, const BlockTables*, int64_t, float*);
    void (*finish)(const PlaneProduct&, int64_t, int64_t, const float*, float, float*);
};

Kernels choose(Path path) {
#ifdef NIWAKI_X86
    if (path == Path::best) path = supported(Path::avx512) ? Path::avx512 : Path::avx2;
    if (path == Path::avx512 && supported(path)) return {fill_block_avx2, sum_plane_avx512, finish_f16c};
    if (path == Path::avx2 && supported(path)) return {fill_block_avx2, sum_plane_avx2, finish_f16c};
#endif
    return {fill_block_portable, sum_plane_portable, finish_portable};
}

constexpr int64_t kBlocksWorthThreads = 128;  // fewer tables are filled before another thread has begun

int64_t blocks_of(const PlaneProduct& p) { return (p.bytes + kBlockBytes - 1) / kBlockBytes; }

void multiply_tile(const PlaneProduct& p, const Kernels& kernels, const BlockTables* tables, int64_t tile, float* out) {
    const int64_t rows = std::min(kTile, p.rows - tile * kTile);
    for (int64_t group = 0; group < p.groups; ++group) {
        const int64_t first = group * p.group_bytes, count = std::min(p.group_bytes, p.bytes - first);
        const BlockTables* own = tables + first / kBlockBytes;
        float total[kTile] = {}, x_sum = 0;
        for (int64_t k = p.bits - 1; k >= 0; --k) {
            float acc[kTile] = {};
            kernels.sum_plane(p.planes + ((tile * p.bits + k) * p.bytes + first) * kTile, own, count, acc);
            for (int64_t row = 0; row < kTile; ++row) total[row] = 2 * total[row] + acc[row];
        }
        for (int64_t block = 0; block * kBlockBytes < count; ++block) x_sum += own[block].sum;
        const int64_t at = group * p.rows + tile * kTile;
        kernels.finish(p, at, rows, total, x_sum, out);
    }
}

}  // namespace

bool supported(Path path) {
#ifdef NIWAKI_X86
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (path == Path::avx2) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    if (path == Path::avx512) return avx512;
    if (path == Path::bf16)
        return avx512 && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16");
    if (path == Path::gfni)
        return avx512 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2") &&
               __builtin_cpu_supports("gfni");
#endif
    return path == Path::best || path == Path::portable;
}

void plane_products(const std::vector<PlaneProduct>& parts, int threads, Path path) {
    const Kernels kernels = choose(path);
    const int64_t tokens = parts[0].tokens, tiles = (parts[0].rows + kTile - 1) / kTile;
    std::vector<int64_t> begins{0};  // of the blocks of every part, all its tokens
    for (const PlaneProduct& p : parts) begins.push_back(begins.back() + tokens * blocks_of(p));
    const std::unique_ptr<BlockTables[]> tables(new BlockTables[begins.back()]);
    over_rows(begins.back(), begins.back() < kBlocksWorthThreads ? 1 : threads, [&](int64_t first, int64_t last) {
        for (size_t i = 0; i < parts.size(); ++i) {
            const PlaneProduct& p = parts[i];
            const int64_t blocks = blocks_of(p), end = std::min(last, begins[i + 1]);
            for (int64_t at = std::max(first, begins[i]); at < end; ++at) {
                const int64_t token = (at - begins[i]) / blocks, block = (at - begins[i]) % blocks;
                float values[8 * kBlockBytes];
                gather(p.x + token * p.inputs, p.column, block * 8 * kBlockBytes, p.columns, values);
                kernels.fill_block(values, tables[at]);
            }
        }
    });
    over_rows(tiles, threads, [&](int64_t first, int64_t last) {
        for (int64_t tile = first; tile < last; ++tile)
            for (size_t i = 0; i < parts.size(); ++i)
                for (int64_t n = 0; n < tokens; ++n) {
                    const PlaneProduct& p = parts[i];
                    const BlockTables* own = &tables[begins[i] + n * blocks_of(p)];
                    multiply_tile(p, kernels, own, tile, p.out + n * p.rows + tile * kTile);
                }
    });
}

}  // namespace niwaki
