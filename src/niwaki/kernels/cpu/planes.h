// Parts that the instruction sets of bit-plane products share, and what each of them provides.

#pragma once

#include "kernels.h"
#include "x86.h"

namespace niwaki {

constexpr int64_t kPlaneTile = 32;  // rows of a tile
constexpr int64_t kBlockBytes = 4;  // bytes of planes (32 columns) that share a table scale
constexpr int64_t kBlockTables = 2 * kBlockBytes;
constexpr float kLargestEntry = 4095;  // eight of them fit in 16 bits

// The tables of 32 columns: low bytes and high bytes of the 16 sums of every four columns.
struct BlockTables {
    alignas(64) uint8_t low[kBlockTables][16], high[kBlockTables][16];
    float scale, sum;
};

// The steps of a product: fill the tables of 32 inputs, add what one plane selects to acc[32], and add the scaled sums
// of the rows of a group to out.
struct PlaneKernels {
    void (*fill_block)(const float* values, BlockTables& made);
    void (*sum_plane)(const uint8_t* plane, const BlockTables* tables, int64_t bytes, float* acc);
    void (*finish)(const PlaneProduct& p, int64_t at, int64_t rows, const float* total, float x_sum, float* out);
};

extern const PlaneKernels kPlanesPortable;

#ifdef NIWAKI_X86
extern const PlaneKernels kPlanesAvx2;
void sum_plane_avx512(const uint8_t* plane, const BlockTables* tables, int64_t bytes, float* acc);

NIWAKI_AVX2 inline __m256 widened(__m128i sums) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(sums));
}

// The sums of 32 rows, in registers.
struct RowSums {
    __m256 a, b, c, d;
};

NIWAKI_AVX2 inline RowSums load_rows(const float* acc) {
    return {_mm256_loadu_ps(acc), _mm256_loadu_ps(acc + 8), _mm256_loadu_ps(acc + 16), _mm256_loadu_ps(acc + 24)};
}

NIWAKI_AVX2 inline void store_rows(const RowSums& rows, float* acc) {
    _mm256_storeu_ps(acc, rows.a), _mm256_storeu_ps(acc + 8, rows.b);
    _mm256_storeu_ps(acc + 16, rows.c), _mm256_storeu_ps(acc + 24, rows.d);
}

// Adds the sums of a block: rows 0-7 and 16-23 in `even`, the others in `odd`.
NIWAKI_AVX2 inline void add_block(__m256i even, __m256i odd, float block_scale, RowSums& rows) {
    const __m256 scale = _mm256_set1_ps(block_scale);
    rows.a = _mm256_fmadd_ps(scale, widened(_mm256_castsi256_si128(even)), rows.a);
    rows.b = _mm256_fmadd_ps(scale, widened(_mm256_castsi256_si128(odd)), rows.b);
    rows.c = _mm256_fmadd_ps(scale, widened(_mm256_extracti128_si256(even, 1)), rows.c);
    rows.d = _mm256_fmadd_ps(scale, widened(_mm256_extracti128_si256(odd, 1)), rows.d);
}
#endif

}  // namespace niwaki
