// Parts that the instruction sets of sparse products share, and what each of them provides.

#pragma once

#include "kernels.h"
#include "x86.h"

namespace niwaki {

constexpr int kAbsent = 255;

// For every byte of places: the number of its values, and the rank of the value of each of its eight columns.
struct Ranks {
    uint8_t rank[256][8];
    uint8_t count[256];
};

const Ranks& ranks(SparseLayout layout);

inline int64_t first_value(const SparseProduct& p, int64_t row) { return p.starts ? p.starts[row] : 4 * row * p.bytes; }

// `rows` multiplies rows [first, last). `decode` writes a row of the matrix as float32: [8 · bytes].
struct SparseKernels {
    void (*rows)(const SparseProduct&, int64_t first, int64_t last);
    void (*decode)(const SparseProduct&, int64_t row, float* own);
};

extern const SparseKernels kSparsePortable;

#ifdef NIWAKI_X86
SparseKernels sparse_avx2(SparseLayout layout, SparseValues kind);

// The same for bfloat16 values. Products need bfloat16 inputs, and rows decode to bfloat16.
struct SparseBf16 {
    void (*rows)(const SparseProduct&, int64_t first, int64_t last);
    void (*decode)(const SparseProduct&, int64_t row, uint16_t* out, int64_t columns);
};

SparseBf16 sparse_bf16(SparseLayout layout);
#endif

}  // namespace niwaki
