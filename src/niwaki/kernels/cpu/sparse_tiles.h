// Parts that the instruction sets of tile products share, and what each of them provides.

#pragma once

#include "kernels.h"
#include "x86.h"

namespace niwaki {

// Rows of a tile, columns that share a scale of the inputs, and groups of four columns in them.
constexpr int64_t kTileRows = 32, kInputBlock = 32, kFours = kInputBlock / 4;
constexpr int kIndex = 3, kNegative = 8;  // bits of a key: which of four columns, and the sign of a code

// The inputs of 32 columns. Entries 0 to 3 of four columns are the inputs, entries from kNegative on their negatives.
struct BlockInputs {
    alignas(64) int8_t high[kFours][16], low[kFours][16];
    float scale;
};

// Writes the outputs [32] of one tile and one token.
void tile_portable(const TileProduct& p, int64_t tile, const BlockInputs* inputs, float* out);

#ifdef NIWAKI_X86
void tile_avx2(const TileProduct& p, int64_t tile, const BlockInputs* inputs, float* out);
void tile_avx512(const TileProduct& p, int64_t tile, const BlockInputs* inputs, float* out);

// Absolute values of signed half bytes.
alignas(16) constexpr int8_t kSizes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1};

// Returns the scales of rows [0, 4) and [8, 12) after `from`, which is the order that unpacking leaves.
NIWAKI_AVX2 inline __m256 eight_scales(const uint16_t* from) {
    const __m128i lower = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const __m128i upper = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8));
    return _mm256_cvtph_ps(_mm_unpacklo_epi64(lower, upper));
}
#endif

}  // namespace niwaki
