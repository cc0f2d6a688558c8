// Arguments of the CPU kernels as plain pointers, and helpers that all of them share.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

// Compiles a function for AVX-512, AVX2 and any processor. The loader of the library chooses one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define NIWAKI_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define NIWAKI_MULTIVERSION
#endif

namespace niwaki {

struct SweepCodes {
    int64_t rows, columns, groups;
    float* wanted;         // [rows, columns], overwritten
    const float* base;     // [rows, columns], read if has_base
    bool has_base;
    const float* feed;     // [columns, columns]
    const float* scale;    // [rows, groups]
    const float* offset;   // [rows, groups]
    const int32_t* group;  // [columns]
    const float* top;      // [columns]
    const uint8_t* keep;   // [rows, columns], zero for a weight that takes the level of zero; or null
    uint8_t* code;         // [rows, columns]
    float* change;         // [rows, columns]
};

void sweep_codes(const SweepCodes& sweep, int threads);

// Finds the states of every ring whose levels miss the wanted values least (kernels/trellis.py).
struct TrellisEncode {
    int64_t rows, columns, bits;
    const float* wanted;  // [rows, columns]
    const float* weight;  // [rows], of a squared miss
    const float* level;   // [256], of every state
    uint8_t* state;       // [rows in whole rings of 32, columns]
};

void trellis_encode(const TrellisEncode& encode, int threads);

// Adds x Wᵀ of one part of a packed matrix (formats/quantized.py). Scales and offsets are float16: [groups, rows].
struct PlaneProduct {
    int64_t tokens, rows, columns, bits, bytes, groups, group_bytes;
    const uint8_t* planes;   // [tiles, bits, bytes, 32]
    const uint16_t* scale;
    const uint16_t* offset;  // or null, which means −(zero or centre) · scale
    const uint8_t* zero;     // [groups, rows] or null
    float centre;
    const int32_t* column;   // [columns], position in a row of x; or null for all in order
    const float* x;          // [tokens, inputs]
    int64_t inputs;
    float* out;              // [tokens, rows]
};

// Instruction set of a product. All but `best` are for tests.
enum class Path { best, portable, avx2, avx512, bf16, gfni, vbmi };

bool supported(Path path);

// Multiplies all parts of one matrix, which share tokens and rows.
void plane_products(const std::vector<PlaneProduct>& parts, int threads, Path path);

// Target of the decoded rows [first, last) of a matrix: float32 or bfloat16, [last − first, columns].
struct Decoded {
    int64_t first, last, columns;
    bool bfloat16;
    void* out;
};

void plane_decode(const std::vector<PlaneProduct>& parts, const Decoded& to, int threads, Path path);

// Adds x Wᵀ of one part of a matrix that a trellis codes (formats/trellis.py). Rings have 4 · bits bytes.
struct TrellisProduct {
    int64_t tokens, rows, columns, bits;
    const uint8_t* rings;   // [tiles, columns, 4 · bits]
    const int8_t* levels;   // [256]
    const uint16_t* scale;  // float16 [rows]
    const int32_t* column;  // [columns], position in a row of x; or null for all in order
    const float* x;         // [tokens, inputs]
    int64_t inputs;
    float* out;             // [tokens, rows]
};

void trellis_products(const std::vector<TrellisProduct>& parts, int threads, Path path);
void trellis_decode(const std::vector<TrellisProduct>& parts, const Decoded& to, int threads, Path path);

enum class SparseLayout { bitmap, two_four };
enum class SparseValues { bf16, fp16, fp32, int8, int4 };

// Writes x Wᵀ of a matrix stored as its nonzeros (formats/sparse.py).
struct SparseProduct {
    int64_t tokens, rows, bytes;  // bytes of places per row, eight columns each
    SparseLayout layout;
    SparseValues kind;
    const uint8_t* places;  // [rows, bytes]
    const uint8_t* values;  // followed by 64 bytes that may be read
    const int32_t* starts;  // [rows], number of the first value of a row; null for two-four, four per byte
    const uint16_t* scale;  // float16 [rows, groups], of codes; or null
    int64_t groups, group_bytes;
    const float* x;  // [tokens, 8 · bytes], zero for a missing column
    float* out;      // [tokens, rows]
    const uint16_t* narrow;  // x as bfloat16 [tokens, narrow_columns], or null for float32 inputs
    int64_t narrow_columns;  // whole blocks of 32
};

void sparse_product(const SparseProduct& product, int threads, Path path);
void sparse_decode(const SparseProduct& product, const Decoded& to, int threads, Path path);

// Writes x Wᵀ of a two-four matrix of 4-bit codes in tiles (formats/sparse_tiles.py).
struct TileProduct {
    int64_t tokens, rows, stored_rows, columns, group;  // columns and groups are whole blocks of 32
    const uint8_t* places;  // [tiles, columns / 8, 32]
    const uint8_t* codes;   // [tiles, columns / 4, 32]
    const uint16_t* scale;  // float16 [groups, stored_rows]
    const float* x;         // [tokens, columns]
    float* out;             // [tokens, rows]
};

void tile_product(const TileProduct& product, int threads, Path path);
void tile_decode(const TileProduct& product, const Decoded& to, int threads);

// Writes x W + bias of a matrix stored by inputs, and reads only the rows whose input is larger than the threshold.
struct InputsProduct {
    int64_t tokens, inputs, outputs, stride;  // rows lie `stride` values apart
    SparseValues kind;                        // one of floats
    const uint8_t* weight;                    // [inputs, outputs]
    const float* x;                           // [tokens, inputs]
    float threshold;
    const float* bias;  // [outputs] or null
    float* out;         // [tokens, outputs]
};

// The same with 4-bit codes in blocks of 128 outputs (kernels/inputs.py). Levels are [groups, 2 · bytes].
struct InputCodesProduct {
    int64_t inputs, outputs, bytes, group;
    const uint8_t* codes;    // [inputs, bytes]
    const uint16_t* scale;   // float16
    const uint16_t* offset;  // float16, or null, which means −(zero or centre) · scale
    const uint8_t* zero;     // or null
    float centre;
    int64_t tokens;
    const float* x;
    float threshold;
    const float* bias;
    float* out;
};

// Both return the number of kept inputs of all tokens.
int64_t inputs_product(const InputsProduct& product, int threads, Path path);
int64_t input_codes_product(const InputCodesProduct& product, int threads, Path path);

inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t exponent = (half >> 10) & 31, fraction = half & 1023;
    if (exponent == 0) {
        const float small = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -small : small;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Rounds to the nearest bfloat16, ties to even. NaN stays NaN.
inline uint16_t narrowed(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Writes a float32 row to its target, with `row` counted from `to.first`.
void put_row(const Decoded& to, int64_t row, const float* own);

// Calls work(first, last) for a share of the rows on each of `threads` threads.
void over_rows(int64_t rows, int threads, const std::function<void(int64_t, int64_t)>& work);

}  // namespace niwaki
