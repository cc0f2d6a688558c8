// Checks of what a matrix brings along, before a kernel follows its pointers. They run once per matrix: constructors
// check what would touch memory, and the functions at the end serve the descriptor of a format, which checks the rest.

#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace niwaki {

constexpr int64_t kMaxSide = INT32_MAX;  // rows and columns are counted in 32 bits

inline void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(std::string("niwaki kernels: ") + what);
}

inline int64_t ceil_div(int64_t value, int64_t by) { return value / by + (value % by != 0); }

// Requires a shape, whose sides are positive, and an address that its elements may have.
template <typename Array>
void require_shape(const Array& array, std::initializer_list<int64_t> shape, const char* what) {
    bool holds = array.ndim() == shape.size();
    size_t axis = 0;
    for (const int64_t side : shape) holds = holds && static_cast<int64_t>(array.shape(axis++)) == side;
    const auto address = reinterpret_cast<uintptr_t>(array.data());
    require(holds && address % sizeof(typename Array::Scalar) == 0, what);
}

inline void require_side(int64_t side, const char* what) { require(side >= 1 && side <= kMaxSide, what); }

// Requires groups of whole bytes of columns that cover all bytes.
inline void require_groups(int64_t groups, int64_t group_bytes, int64_t bytes, const char* what) {
    require(group_bytes >= 1 && group_bytes <= kMaxSide && groups == ceil_div(bytes, group_bytes), what);
}

// Requires of every row that its values lie before the last 64 bytes, which kernels may read.
void require_values(const SparseProduct& product, int64_t value_bytes);

// Whether `count` numbers are finite, from any address. The kind is one of floats.
bool all_finite(const uint8_t* bytes, int64_t count, SparseValues kind);

// Whether both indices of every pair of a two-four matrix ascend; in tiles of [lines, 32] bytes, those of `rows`.
bool pairs_ascend(const uint8_t* places, int64_t count);
bool tile_pairs_ascend(const uint8_t* places, int64_t lines, int64_t rows);

// Number of values of a bitmap, whether one lies after the last column, and whether `starts` counts them.
struct BitmapScan {
    int64_t count;
    bool beyond, ordered;
};

BitmapScan scan_bitmap(const uint8_t* places, int64_t rows, int64_t columns, const int32_t* starts);

}  // namespace niwaki
