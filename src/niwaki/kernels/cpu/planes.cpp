// Products with matrices stored as bit planes (formats/quantized.py: pack_planes), by tables. For every four columns of
// the input a table holds the sums of all 16 subsets, and one byte shuffle looks up the sums of 32 rows. A weight of K
// bits costs K/4 of a lookup, whatever its scales.
//
// Table entries are whole numbers of 13 bits with a scale for every 32 columns. Eight of them add up in 16 bits without
// overflow. Against float32 the rounding costs about 3e-4 of the norm of the output. All else is float32.
//
// This file chooses the instruction set, and all of them give the same sums: planes_avx512.cpp, planes_avx2.cpp, or
// planes_portable.cpp.

#include "planes.h"

#include <memory>

namespace niwaki {
namespace {

PlaneKernels choose(Path path) {
#ifdef NIWAKI_X86
    if (path == Path::best) path = supported(Path::avx512) ? Path::avx512 : Path::avx2;
    if (path == Path::avx512 && supported(path)) return {kPlanesAvx2.fill_block, sum_plane_avx512, kPlanesAvx2.finish};
    if (path == Path::avx2 && supported(path)) return kPlanesAvx2;
#endif
    return kPlanesPortable;
}

// Copies the 32 inputs of a block, with zero for a missing column.
void gather(const float* x, const int32_t* places, int64_t first, int64_t columns, float* values) {
    for (int64_t i = 0; i < 8 * kBlockBytes; ++i) {
        const int64_t column = first + i;
        values[i] = column < columns ? x[places ? places[column] : column] : 0;
    }
}

constexpr int64_t kBlocksWorthThreads = 128;  // with fewer, one thread fills the tables before another starts

int64_t blocks_of(const PlaneProduct& p) { return (p.bytes + kBlockBytes - 1) / kBlockBytes; }

void multiply_tile(const PlaneProduct& p, const PlaneKernels& kernels, const BlockTables* tables, int64_t tile, float* out) {
    const int64_t rows = std::min(kPlaneTile, p.rows - tile * kPlaneTile);
    for (int64_t group = 0; group < p.groups; ++group) {
        const int64_t first = group * p.group_bytes, count = std::min(p.group_bytes, p.bytes - first);
        const BlockTables* own = tables + first / kBlockBytes;
        float total[kPlaneTile] = {}, x_sum = 0;
        for (int64_t k = p.bits - 1; k >= 0; --k) {
            float acc[kPlaneTile] = {};
            kernels.sum_plane(p.planes + ((tile * p.bits + k) * p.bytes + first) * kPlaneTile, own, count, acc);
            for (int64_t row = 0; row < kPlaneTile; ++row) total[row] = 2 * total[row] + acc[row];
        }
        for (int64_t block = 0; block * kBlockBytes < count; ++block) x_sum += own[block].sum;
        const int64_t at = group * p.rows + tile * kPlaneTile;
        kernels.finish(p, at, rows, total, x_sum, out);
    }
}

}  // namespace

void plane_products(const std::vector<PlaneProduct>& parts, int threads, Path path) {
    const PlaneKernels kernels = choose(path);
    const int64_t tokens = parts[0].tokens, tiles = (parts[0].rows + kPlaneTile - 1) / kPlaneTile;
    std::vector<int64_t> begins{0};  // first block of every part; a part has the blocks of all its tokens
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
                    multiply_tile(p, kernels, own, tile, p.out + n * p.rows + tile * kPlaneTile);
                }
    });
}

}  // namespace niwaki
