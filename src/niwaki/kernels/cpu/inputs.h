// What the instruction sets of products with kept inputs provide (inputs.cpp).

#pragma once

#include "kernels.h"
#include "x86.h"

namespace niwaki {

constexpr int64_t kPass = 8;           // rows that are added together, so that the sums are loaded once
constexpr int64_t kCodeOutputs = 128;  // outputs of a block of codes
constexpr int64_t kCodeBytes = 64;     // of such a block
constexpr int64_t kRunInputs = 256;    // of one sum in 32 bits: 256 · 32767 · 15 · 16 < 2^31

// Some rows of a matrix. The pointer is that of the first output of row 0, and rows lie `row_bytes` apart.
struct KeptRows {
    const uint8_t* weight;
    int64_t row_bytes;
    const int32_t* input;
    const float* value;
    int64_t count, listed;  // rows to add, and rows of the list from here on: those after `count` are read next
};

// Adds Σ value · row to the sums [outputs].
using AddRows = void (*)(const KeptRows& rows, int64_t outputs, float* sums);

// Rows of codes in pairs. A value holds the factors of both, 16 bits each.
struct KeptPairs {
    const uint8_t* codes;
    int64_t row_bytes;
    const int32_t* input;  // two of each pair
    const int32_t* value;
    int64_t count, listed;
};

// Adds Σ factor · code to the sums [blocks, 2, 4, 16]. Those of the odd fours are 16 times as large.
using AddPairs = void (*)(const KeptPairs& pairs, int64_t blocks, int32_t* sums);

// Levels of one group from a block on, and what the sums of a run stand for.
struct RunLevels {
    const uint16_t* scale;   // float16
    const uint16_t* offset;  // float16, or null
    const uint8_t* zero;     // or null
    float centre;
    float factor;  // of a sum
    float shift;   // to add to a sum times its factor
    float total;   // Σ value of all rows
};

// Adds scale · (factor · sum + shift) + offset · total to the outputs [blocks, 128], and clears the sums.
using FinishRun = void (*)(const RunLevels& levels, int64_t blocks, int32_t* sums, float* out);

struct InputKernels {
    AddRows add[3];  // by kind of values
    AddPairs add_pairs;
    FinishRun finish;
};

extern const InputKernels kInputsPortable;
#ifdef NIWAKI_X86
extern const InputKernels kInputsAvx2, kInputsAvx512;
#endif

inline float value_at(const uint8_t* row, int64_t at, SparseValues kind) {
    if (kind == SparseValues::fp32) {
        float value;
        std::memcpy(&value, row + 4 * at, 4);
        return value;
    }
    uint16_t half;
    std::memcpy(&half, row + 2 * at, 2);
    if (kind == SparseValues::fp16) return half_to_float(half);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Adds to the outputs [first, last) only: those that do not fill a register.
inline void add_rest(const KeptRows& rows, SparseValues kind, int64_t first, int64_t last, float* sums) {
    for (int64_t k = 0; k < rows.count && first < last; ++k) {
        const uint8_t* row = rows.weight + rows.input[k] * rows.row_bytes;
        for (int64_t o = first; o < last; ++o) sums[o] += rows.value[k] * value_at(row, o, kind);
    }
}

}  // namespace niwaki
