// Parts that the instruction sets of trellis products share, and what each of them provides.

#pragma once

#include "kernels.h"
#include "x86.h"

namespace niwaki {

constexpr int64_t kRing = 32;      // rows of a ring, the rows of a tile
constexpr int64_t kTogether = 16;  // columns that are decoded together, a cache line of a row

// Inputs of one part as the kernels read them: float32, or 16-bit numbers with a scale for every `kTrellisBlock` columns.
// Zeros follow up to a multiple of four columns.
struct TrellisInputs {
    std::vector<float> x;
    std::vector<int16_t> whole;     // 256 · high + low
    std::vector<int8_t> high, low;
    std::vector<float> scale;       // of every block
    std::vector<int32_t> sum;       // of the whole numbers of every block
};

// Whole numbers lie in [-kWhole, kWhole]: both of their bytes have a sign.
constexpr int kWhole = 127 * 256 + 127;

// Products of two whole numbers, of 8 and 16 bits, are less than 2^22: 256 of them add up in 32 bits.
constexpr int64_t kTrellisBlock = 256;

// Adds the products of the rows of one tile with the inputs of all tokens to sums[tokens][32], without the scales of the
// rows. No byte is read from the `end` of all rings on.
using TrellisTile = void (*)(const TrellisProduct& p, const uint8_t* rings, const uint8_t* end,
                             const TrellisInputs* inputs, float* sums);

void trellis_tile_portable(const TrellisProduct& p, const uint8_t* rings, const uint8_t* end, const TrellisInputs* inputs,
                         float* sums);
#ifdef NIWAKI_X86
void trellis_tile_avx2(const TrellisProduct& p, const uint8_t* rings, const uint8_t* end, const TrellisInputs* inputs,
                         float* sums);
void trellis_tile_vbmi(const TrellisProduct& p, const uint8_t* rings, const uint8_t* end, const TrellisInputs* inputs,
                         float* sums);
void trellis_decode_vbmi(const TrellisProduct& p, const uint8_t* rings, const float* scale, float* own, int64_t stride);
#endif

// Puts some decoded columns of a tile, from the number `first` of the part on, to their places in own[32][stride].
inline void put_columns(const TrellisProduct& p, const float (*some)[kTogether], int64_t first, int64_t count, float* own,
                        int64_t stride) {
    for (int64_t row = 0; row < kRing; ++row) {
        float* at = own + row * stride;
        if (!p.column)
            std::memcpy(at + first, some[row], sizeof(float) * count);
        else
            for (int64_t i = 0; i < count; ++i) at[p.column[first + i]] = some[row][i];
    }
}

// Writes the states of a ring of K bits: the byte that begins at the bits of each row.
template <int K>
inline void ring_states(const uint8_t* ring, uint8_t* state) {
    constexpr int kBits = 32 * K;
    uint64_t low = 0, high = 0;
    std::memcpy(&low, ring, std::min(4 * K, 8));
    if (K > 2) std::memcpy(&high, ring + 8, K > 2 ? 4 * K - 8 : 0);
    if (K == 1) low |= low << 32;
    for (int eight = 0; eight < 4; ++eight) {
        const int begin = 8 * K * eight, shift = begin % 64;
        uint64_t word = begin < 64 ? low >> shift : high >> shift;
        // What follows: the upper bits of the ring, or its beginning after the end.
        if (K == 2 && shift) word |= low << (64 - shift);
        if (K > 2 && begin < 64 && shift) word |= high << (64 - shift);
        if (K > 2 && begin > 64) word |= low << (kBits - begin);  // at 64 the upper bits are enough
        for (int row = 0; row < 8; ++row) state[8 * eight + row] = static_cast<uint8_t>(word >> (K * row));
    }
}

}  // namespace niwaki
