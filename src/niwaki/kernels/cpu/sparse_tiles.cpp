// Products with two-four matrices of 4-bit codes in tiles of 32 rows (formats/sparse_tiles.py). For every four columns of
// the input, a table of 16 bytes holds the four inputs with either sign. One byte shuffle looks up 32 or 64 values by
// index and sign. One instruction multiplies them with the absolute codes and adds the two of a row.
//
// Inputs are whole numbers of 14 bits with a scale for every 32 columns, in two bytes. Eight pairs of products add up in
// 16 bits without overflow. Against float32 the rounding costs about 1e-4 of the norm of the output. All else is float32.

#include "sparse_tiles.h"

#include <cmath>
#include <memory>

namespace niwaki {
namespace {

constexpr float kLargest = 8127;  // 63 · 128 + 63: high and low bytes are both signed

void fill_inputs(const float* x, BlockInputs& made) {
    float largest = 0;
    bool finite = true;
    for (int64_t i = 0; i < kInputBlock; ++i) {
        largest = std::max(largest, std::fabs(x[i]));
        finite &= std::isfinite(x[i]);
    }
    made.scale = finite ? largest / kLargest : NAN;
    const float inverse = finite && largest > 0 ? kLargest / largest : 0;
    std::memset(made.high, 0, sizeof made.high), std::memset(made.low, 0, sizeof made.low);
    for (int64_t i = 0; i < kInputBlock; ++i) {
        const int whole = static_cast<int>(std::nearbyint(finite ? x[i] * inverse : 0));
        const int high = (whole + 64) >> 7, low = whole - 128 * high;
        made.high[i / 4][i % 4] = static_cast<int8_t>(high), made.low[i / 4][i % 4] = static_cast<int8_t>(low);
        made.high[i / 4][kNegative + i % 4] = static_cast<int8_t>(-high);
        made.low[i / 4][kNegative + i % 4] = static_cast<int8_t>(-low);
    }
}

float put(float value, float*) { return value; }
uint16_t put(float value, uint16_t*) { return narrowed(value); }

// Writes a row of the matrix. A table per group holds the value of every code.
template <typename T>
void decode_row(const TileProduct& p, int64_t row, T* out) {
    const int64_t fours = p.columns / 4, tile = row / kTileRows, half = row % kTileRows / 16, at = 2 * (row % 16);
    const uint8_t* places = p.places + tile * fours / 2 * kTileRows + at;
    const uint8_t* codes = p.codes + tile * fours * kTileRows + at;
    for (int64_t first = 0, group = 0; first < p.columns; first += p.group, ++group) {
        const float scale = half_to_float(p.scale[group * p.stored_rows + row]);
        T value[16];
        for (int code = 0; code < 16; ++code) value[code] = put(scale * static_cast<float>((code ^ 8) - 8), out);
        for (int64_t four = first / 4; four < std::min(p.columns, first + p.group) / 4; ++four) {
            const int shift = static_cast<int>(4 * (four & 1) + 2 * half);
            T* own = out + 4 * four;
            std::memset(own, 0, 4 * sizeof(T));
            for (int64_t i = 0; i < 2; ++i)
                own[places[four / 2 * kTileRows + i] >> shift & kIndex] = value[codes[four * kTileRows + i] >> (4 * half) & 15];
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
    const int64_t blocks = p.columns / kInputBlock, tiles = p.stored_rows / kTileRows;
    const std::unique_ptr<BlockInputs[]> inputs(new BlockInputs[p.tokens * blocks]);
    for (int64_t n = 0; n < p.tokens; ++n)
        for (int64_t b = 0; b < blocks; ++b) fill_inputs(p.x + n * p.columns + b * kInputBlock, inputs[n * blocks + b]);
    over_rows(tiles, threads, [&](int64_t first, int64_t last) {
        for (int64_t tile = first; tile < last; ++tile)
            for (int64_t n = 0; n < p.tokens; ++n) {
                float own[kTileRows];
                tile_of(p, tile, &inputs[n * blocks], own);
                std::copy_n(own, std::min(kTileRows, p.rows - tile * kTileRows), p.out + n * p.rows + tile * kTileRows);
            }
    });
}

}  // namespace niwaki
