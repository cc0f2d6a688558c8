// Products with bit planes in portable code.

#include "planes.h"

#include <cmath>

namespace niwaki {
namespace {

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
    made.scale = largest / kLargestEntry;
    const float inverse = largest > 0 ? kLargestEntry / largest : 0;
    for (int64_t t = 0; t < kBlockTables; ++t)
        for (int64_t s = 0; s < 16; ++s) {
            const auto entry = static_cast<uint16_t>(static_cast<int16_t>(std::nearbyint(sums[t][s] * inverse)));
            made.low[t][s] = entry & 255, made.high[t][s] = entry >> 8;
        }
}

// Adds to acc[32] the sums that `bytes` bytes of one plane select, from the first byte of a block on.
void sum_plane_portable(const uint8_t* plane, const BlockTables* tables, int64_t bytes, float* acc) {
    for (int64_t first = 0; first < bytes; first += kBlockBytes, ++tables)
        for (int64_t row = 0; row < kPlaneTile; ++row) {
            int32_t sum = 0;
            for (int64_t b = 0; b < std::min(kBlockBytes, bytes - first); ++b) {
                const uint8_t byte = plane[(first + b) * kPlaneTile + row];
                const int low = byte & 15, high = byte >> 4;
                sum += static_cast<int16_t>(tables->low[2 * b][low] | tables->high[2 * b][low] << 8);
                sum += static_cast<int16_t>(tables->low[2 * b + 1][high] | tables->high[2 * b + 1][high] << 8);
            }
            acc[row] += tables->scale * static_cast<float>(sum);
        }
}

// Adds scale · total + offset · x_sum to the rows of one group, with scales, offsets and zero codes as stored.
void finish_portable(const PlaneProduct& p, int64_t at, int64_t rows, const float* total, float x_sum, float* out) {
    for (int64_t row = 0; row < rows; ++row) {
        const float scale = half_to_float(p.scale[at + row]);
        const float offset = p.offset ? half_to_float(p.offset[at + row])
                                      : -(p.zero ? static_cast<float>(p.zero[at + row]) : p.centre) * scale;
        out[row] += scale * total[row] + offset * x_sum;
    }
}

}  // namespace

const PlaneKernels kPlanesPortable{fill_block_portable, sum_plane_portable, finish_portable};

}  // namespace niwaki
