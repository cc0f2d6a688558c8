// What the CPU kernels share: their arguments as plain pointers, and rows divided over threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

// The same loop compiled for AVX-512, AVX2 and any processor, chosen when the library is loaded.
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
    const uint8_t* keep;   // [rows, columns], zero where a weight takes the level of zero; or null
    uint8_t* code;         // [rows, columns]
    float* change;         // [rows, columns]
};

void sweep_codes(const SweepCodes& sweep, int threads);

// out += x Wᵀ for one part of a packed matrix (codes.py). Scales and offsets are float16, [groups, rows].
struct PlaneProduct {
    int64_t tokens, rows, columns, bits, bytes, groups, group_bytes;
    const uint8_t* planes;   // [tiles, bits, bytes, 32]
    const uint16_t* scale;
    const uint16_t* offset;  // or null: then the offset is −(zero or centre) · scale
    const uint8_t* zero;     // [groups, rows] or null
    float centre;
    const int32_t* column;   // [columns]: where in a row of x they lie, or null for as they are
    const float* x;          // [tokens, inputs]
    int64_t inputs;
    float* out;              // [tokens, rows]
};

// The instructions a product may use; anything but `best` is for tests.
enum class Path { best, portable, avx2, avx512, bf16, gfni };

bool supported(Path path);

// All parts of one matrix: they share tokens and rows.
void plane_products(const std::vector<PlaneProduct>& parts, int threads, Path path);

// Where rows [first, last) of a matrix itself go: float32 or bfloat16, [last − first, columns].
struct Decoded {
    int64_t first, last, columns;
    bool bfloat16;
    void* out;
};

void plane_decode(const std::vector<PlaneProduct>& parts, const Decoded& to, int threads, Path path);

enum class SparseLayout { bitmap, two_four };
enum class SparseValues { bf16, fp16, fp32, int8, int4 };

// out = x Wᵀ for a matrix stored as its nonzeros (sparse.py).
struct SparseProduct {
    int64_t tokens, rows, bytes;  // bytes of places a row, eight columns each
    SparseLayout layout;
    SparseValues kind;
    const uint8_t* places;  // [rows, bytes]
    const uint8_t* values;  // and 64 bytes that may be read beyond them
    const int32_t* starts;  // [rows], the number of a row's first value; null for two-four: four a byte
    const uint16_t* scale;  // float16 [rows, groups], of codes; or null
    int64_t groups, group_bytes;
    const float* x;  // [tokens, 8 · bytes], zero where there is no column
    float* out;      // [tokens, rows]
    const uint16_t* narrow;  // x as bfloat16 [tokens, narrow_columns], or null if it was not
    int64_t narrow_columns;  // whole blocks of 32
};

void sparse_product(const SparseProduct& product, int threads, Path path);
void sparse_decode(const SparseProduct& product, const Decoded& to, int threads, Path path);

// out = x Wᵀ for a two-four matrix of 4-bit codes in tiles (sparse_tiles.py).
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

// To the nearest bfloat16, ties to even; NaN stays NaN.
inline uint16_t narrowed(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Puts a row of float32 where it goes, `row` counted from the first.
void put_row(const Decoded& to, int64_t row, const float* own);

// Calls work(first, last) for a share of the rows on each of `threads` threads.
void over_rows(int64_t rows, int threads, const std::function<void(int64_t, int64_t)>& work);

}  // namespace niwaki
