// Products with kept inputs in portable code, and the order of the codes: nibble k of word (l, h, j) of a block belongs to
// output 64 h + 16 k + 4 l + j, so that unpacked registers hold neighbouring outputs.

#include "inputs.h"

namespace niwaki {
namespace {

template <SparseValues kind>
NIWAKI_MULTIVERSION void add_rows(const KeptRows& rows, int64_t outputs, float* sums) {
    add_rest(rows, kind, 0, outputs, sums);
}

void add_pairs(const KeptPairs& pairs, int64_t blocks, int32_t* sums) {
    for (int64_t k = 0; k < 2 * pairs.count; ++k) {
        const uint8_t* row = pairs.codes + pairs.input[k] * pairs.row_bytes;
        const int32_t value = static_cast<int16_t>(pairs.value[k / 2] >> 16 * (k & 1) & 0xffff);
        for (int64_t word = 0; word < blocks * 32; ++word) {
            const int32_t four = row[2 * word] | row[2 * word + 1] << 8;
            int32_t* own = sums + word / 32 * kCodeOutputs + (word >> 2 & 1) * 64 + (word >> 3 & 3) * 4 + (word & 3);
            for (int i = 0; i < 4; ++i) own[16 * i] += value * ((four >> 4 * i & 15) << 4 * (i & 1));
        }
    }
}

void finish(const RunLevels& levels, int64_t blocks, int32_t* sums, float* out) {
    for (int64_t o = 0; o < blocks * kCodeOutputs; ++o) {
        const float scale = half_to_float(levels.scale[o]);
        const float factor = o >> 4 & 1 ? levels.factor / 16 : levels.factor;
        const float sum = static_cast<float>(sums[o]) * factor + levels.shift;
        const float zero = levels.zero ? static_cast<float>(levels.zero[o]) : levels.centre;
        out[o] += levels.offset ? scale * sum + half_to_float(levels.offset[o]) * levels.total
                                : scale * (sum - zero * levels.total);
        sums[o] = 0;
    }
}

}  // namespace

const InputKernels kInputsPortable = {
    {add_rows<SparseValues::bf16>, add_rows<SparseValues::fp16>, add_rows<SparseValues::fp32>}, add_pairs, finish};

}  // namespace niwaki
