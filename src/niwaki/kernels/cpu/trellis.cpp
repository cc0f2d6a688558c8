// Products with matrices that a trellis codes (formats/trellis.py). The states of 32 rows come from one ring, and each
// looks up its level. AVX2 and AVX-512 with VBMI multiply whole numbers of 16 bits, which round the inputs by 2^-16 of
// the largest one of 256, and give the same sums; portable code multiplies float32.
//
// This file chooses the instruction set, and decodes for products of many tokens: trellis_vbmi.cpp, trellis_avx2.cpp, or
// portable code.

#include "trellis.h"

#include <algorithm>
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

// Writes a part of a decoded tile to own[32][stride]. Rows after the last one have a scale of zero. A few columns at a
// time are decoded into a buffer that the cache holds: whole columns lie too far apart in `own`.
void decode_portable(const TrellisProduct& p, const uint8_t* rings, const float* scale, float* own, int64_t stride) {
    float level[256];
    for (int state = 0; state < 256; ++state) level[state] = p.levels[state];
    for_bits(p.bits, [&](auto bits) {
        constexpr int kBits = decltype(bits)::value;
        for (int64_t first = 0; first < p.columns; first += kTogether) {
            const int64_t count = std::min(kTogether, p.columns - first);
            float some[kRing][kTogether];
            for (int64_t i = 0; i < count; ++i) {
                uint8_t state[kRing];
                ring_states<kBits>(rings + (first + i) * 4 * kBits, state);
                for (int64_t row = 0; row < kRing; ++row) some[row][i] = level[state[row]] * scale[row];
            }
            put_columns(p, some, first, count, own, stride);
        }
    });
}

using TrellisDecodeTile = void (*)(const TrellisProduct&, const uint8_t*, const float*, float*, int64_t);

TrellisDecodeTile choose_decode(Path path) {
#ifdef NIWAKI_X86
    if ((path == Path::best || path == Path::vbmi) && supported(Path::vbmi)) return trellis_decode_vbmi;
#endif
    return decode_portable;
}

// Gathers the inputs of a part, and rounds them to whole numbers for the kernels that take them.
TrellisInputs gather(const TrellisProduct& p, const float* x) {
    const int64_t padded = (p.columns + 3) / 4 * 4;
    TrellisInputs made;
    made.x.resize(padded), made.whole.resize(padded), made.high.resize(padded), made.low.resize(padded);
    for (int64_t i = 0; i < p.columns; ++i) made.x[i] = x[p.column ? p.column[i] : i];
    for (int64_t first = 0; first < padded; first += kTrellisBlock) {
        const int64_t last = std::min(padded, first + kTrellisBlock);
        float largest = 0;
        for (int64_t i = first; i < last; ++i) largest = std::max(largest, std::fabs(made.x[i]));
        // NaN and infinity reach the output through the scale.
        for (int64_t i = first; i < last; ++i)
            if (!std::isfinite(made.x[i])) largest = made.x[i] * 0;
        const float scale = largest > 0 ? largest / kWhole : largest;
        made.scale.push_back(scale);
        int32_t sum = 0;
        for (int64_t i = first; i < last; ++i) {
            const int whole = scale > 0 ? static_cast<int>(std::nearbyint(made.x[i] / scale)) : 0;
            made.whole[i] = static_cast<int16_t>(std::clamp(whole, -kWhole, kWhole));
            made.low[i] = static_cast<int8_t>(made.whole[i]);
            made.high[i] = static_cast<int8_t>((made.whole[i] - made.low[i]) / 256);
            sum += made.whole[i];
        }
        made.sum.push_back(sum);
    }
    return made;
}

}  // namespace

void trellis_tile_portable(const TrellisProduct& p, const uint8_t* rings, const uint8_t*, const TrellisInputs* inputs,
                           float* sums) {
    for_bits(p.bits, [&](auto bits) {
        constexpr int kBits = decltype(bits)::value;
        for (int64_t column = 0; column < p.columns; ++column) {
            uint8_t state[kRing];
            ring_states<kBits>(rings + column * 4 * kBits, state);
            for (int64_t n = 0; n < p.tokens; ++n) {
                const float x = inputs[n].x[column];
                for (int64_t row = 0; row < kRing; ++row) sums[n * kRing + row] += x * p.levels[state[row]];
            }
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
        std::vector<float> sums(tokens * kRing);
        for (int64_t tile = first; tile < last; ++tile)
            for (size_t i = 0; i < parts.size(); ++i) {
                const TrellisProduct& p = parts[i];
                const int64_t bytes = p.columns * 4 * p.bits;
                std::fill(sums.begin(), sums.end(), 0.0f);
                multiply(p, p.rings + tile * bytes, p.rings + tiles * bytes, &inputs[i * tokens], sums.data());
                for (int64_t n = 0; n < tokens; ++n)
                    for (int64_t row = tile * kRing; row < std::min(rows, (tile + 1) * kRing); ++row)
                        p.out[n * rows + row] += sums[n * kRing + row % kRing] * half_to_float(p.scale[row]);
            }
    });
}

void trellis_decode(const std::vector<TrellisProduct>& parts, const Decoded& to, int threads, Path path) {
    const TrellisDecodeTile decode = choose_decode(path);
    const int64_t first_tile = to.first / kRing, tiles = (to.last + kRing - 1) / kRing - first_tile;
    over_rows(tiles, threads, [&](int64_t begin, int64_t end) {
        const int64_t stride = to.columns + kTogether;  // rows that are a power of two apart push each other out of a cache
        std::vector<float> own(kRing * stride);
        for (int64_t tile = first_tile + begin; tile < first_tile + end; ++tile) {
            const int64_t rows = std::min(kRing, to.last - tile * kRing);
            for (const TrellisProduct& p : parts) {
                float scale[kRing] = {};
                for (int64_t row = 0; row < rows; ++row) scale[row] = half_to_float(p.scale[tile * kRing + row]);
                decode(p, p.rings + tile * p.columns * 4 * p.bits, scale, own.data(), stride);
            }
            for (int64_t row = 0; row < rows; ++row)
                put_row(to, tile * kRing + row - to.first, own.data() + row * stride);
        }
    });
}

}  // namespace niwaki
