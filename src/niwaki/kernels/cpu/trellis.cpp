// Products with matrices that a trellis codes (formats/trellis.py). The states of 32 rows come from one ring, and each
// looks up its level. AVX2 and AVX-512 with VBMI multiply whole numbers of 16 bits, which round the inputs by 2^-16 of
// the largest one of 256, and give the same sums; portable code multiplies float32.
//
// This file chooses the instruction set, and decodes for products of many tokens: trellis_vbmi.cpp, trellis_avx2.cpp, or
// portable code.

#include "trellis.h"

#include <cmath>
#include <type_traits>

namespace niwaki {
namespace {

TrellisTile choose(Path path) {
#ifdef NIWAKI_X86
    if (path == Path::best) path = supported(Path::vbmi) ? Path::vbmi : Path::avx2;
    if (path == Path::vbmi && supported(path)) return trellis_tile_vbmi;
    if (path == Path::avx2 && supported(path)) return trellis_tile_avx2;
#endif
    return trellis_tile_portable;
}

// Calls work with the number of bits as a type.
template <typename Work>
void for_bits(int64_t bits, const Work& work) {
    if (bits == 1) work(std::integral_constant<int, 1>());
    if (bits == 2) work(std::integral_constant<int, 2>());
    if (bits == 3) work(std::integral_constant<int, 3>());
    if (bits == 4) work(std::integral_constant<int, 4>());
}

// Writes a part of a decoded tile to own[32][columns]. Rows after the last one have a scale of zero.
void decode_tile(const TrellisProduct& p, const uint8_t* rings, const float* scale, float* own, int64_t columns) {
    for_bits(p.bits, [&](auto bits) {
        constexpr int kBits = decltype(bits)::value;
        for (int64_t column = 0; column < p.columns; ++column) {
            uint8_t state[kRing];
            ring_states<kBits>(rings + column * 4 * kBits, state);
            float* at = own + (p.column ? p.column[column] : column);
            for (int64_t row = 0; row < kRing; ++row) at[row * columns] = p.levels[state[row]] * scale[row];
        }
    });
}

// Gathers the inputs of a part, and rounds them to whole numbers for the kernels that take them.
TrellisInputs gather(const TrellisProduct& p, const float* x) {
    const int64_t even = p.columns + p.columns % 2;
    TrellisInputs made{std::vector<float>(even), std::vector<int16_t>(even), {}};
    for (int64_t i = 0; i < p.columns; ++i) made.x[i] = x[p.column ? p.column[i] : i];
    for (int64_t first = 0; first < even; first += kTrellisBlock) {
        const int64_t last = std::min(even, first + kTrellisBlock);
        float largest = 0;
        for (int64_t i = first; i < last; ++i) largest = std::max(largest, std::fabs(made.x[i]));
        // NaN and infinity reach the output through the scale.
        for (int64_t i = first; i < last; ++i)
            if (!std::isfinite(made.x[i])) largest = made.x[i] * 0;
        const float scale = largest > 0 ? largest / 32767 : largest;
        made.scale.push_back(scale);
        for (int64_t i = first; i < last; ++i)
            made.whole[i] = scale > 0 ? static_cast<int16_t>(std::nearbyint(made.x[i] / scale)) : 0;
    }
    return made;
}

}  // namespace

void trellis_tile_portable(const TrellisProduct& p, const uint8_t* rings, const uint8_t*, const TrellisInputs& inputs,
                           float* sums) {
    for_bits(p.bits, [&](auto bits) {
        constexpr int kBits = decltype(bits)::value;
        for (int64_t column = 0; column < p.columns; ++column) {
            uint8_t state[kRing];
            ring_states<kBits>(rings + column * 4 * kBits, state);
            const float x = inputs.x[column];
            for (int64_t row = 0; row < kRing; ++row) sums[row] += x * p.levels[state[row]];
        }
    });
}

void trellis_products(const std::vector<TrellisProduct>& parts, int threads, Path path) {
    const TrellisTile multiply = choose(path);
    const int64_t tokens = parts[0].tokens, rows = parts[0].rows, tiles = (rows + kRing - 1) / kRing;
    std::vector<TrellisInputs> inputs;
    for (const TrellisProduct& p : parts)
        for (int64_t n = 0; n < tokens; ++n) inputs.push_back(gather(p, p.x + n * p.inputs));
    over_rows(tiles, threads, [&](int64_t first, int64_t last) {
        for (int64_t tile = first; tile < last; ++tile)
            for (size_t i = 0; i < parts.size(); ++i)
                for (int64_t n = 0; n < tokens; ++n) {
                    const TrellisProduct& p = parts[i];
                    float sums[kRing] = {};
                    const int64_t bytes = p.columns * 4 * p.bits;
                    multiply(p, p.rings + tile * bytes, p.rings + tiles * bytes, inputs[i * tokens + n], sums);
                    for (int64_t row = tile * kRing; row < std::min(rows, (tile + 1) * kRing); ++row)
                        p.out[n * rows + row] += sums[row % kRing] * half_to_float(p.scale[row]);
                }
    });
}

void trellis_decode(const std::vector<TrellisProduct>& parts, const Decoded& to, int threads, Path) {
    const int64_t first_tile = to.first / kRing, tiles = (to.last + kRing - 1) / kRing - first_tile;
    over_rows(tiles, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> own(kRing * to.columns);
        for (int64_t tile = first_tile + begin; tile < first_tile + end; ++tile) {
            const int64_t rows = std::min(kRing, to.last - tile * kRing);
            for (const TrellisProduct& p : parts) {
                float scale[kRing] = {};
                for (int64_t row = 0; row < rows; ++row) scale[row] = half_to_float(p.scale[tile * kRing + row]);
                decode_tile(p, p.rings + tile * p.columns * 4 * p.bits, scale, own.data(), to.columns);
            }
            for (int64_t row = 0; row < rows; ++row)
                put_row(to, tile * kRing + row - to.first, own.data() + row * to.columns);
        }
    });
}

}  // namespace niwaki
