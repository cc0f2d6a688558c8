// Products with tiles in portable code.

#include "sparse_tiles.h"

namespace niwaki {

void tile_portable(const TileProduct& p, int64_t tile, const BlockInputs* inputs, float* out) {
    const int64_t fours = p.columns / 4;
    std::fill_n(out, kTileRows, 0.0f);
    for (int64_t group = 0; group * p.group < p.columns; ++group) {
        float sums[kTileRows] = {}, scale[kTileRows];
        for (int64_t b = group * p.group / kInputBlock; b < std::min(p.columns, (group + 1) * p.group) / kInputBlock; ++b) {
            int32_t total[kTileRows] = {};
            for (int64_t g = 0; g < kFours; ++g) {
                const int64_t four = b * kFours + g;
                const uint8_t* places = p.places + (tile * fours / 2 + four / 2) * kTileRows;
                const uint8_t* codes = p.codes + (tile * fours + four) * kTileRows;
                for (int64_t i = 0; i < kTileRows; ++i)
                    for (int half = 0; half < 2; ++half) {
                        const int index = places[i] >> (4 * (four & 1) + 2 * half) & kIndex;
                        const int code = ((codes[i] >> (4 * half) & 15) ^ 8) - 8;
                        total[16 * half + i / 2] += code * (128 * inputs[b].high[g][index] + inputs[b].low[g][index]);
                    }
            }
            for (int64_t r = 0; r < kTileRows; ++r) sums[r] += inputs[b].scale * static_cast<float>(total[r]);
        }
        for (int64_t r = 0; r < kTileRows; ++r)
            scale[r] = half_to_float(p.scale[group * p.stored_rows + tile * kTileRows + r]);
        for (int64_t r = 0; r < kTileRows; ++r) out[r] += scale[r] * sums[r];
    }
}

}  // namespace niwaki
