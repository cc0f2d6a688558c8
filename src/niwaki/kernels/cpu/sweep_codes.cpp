// Column sweep of quantization, a row at a time, with the contract of kernels/codes.py: sweep_codes. Rows are independent.
// On a second pass most codes stay the same, and a row costs only the columns that changed.

#include "kernels.h"

#include <algorithm>
#include <cmath>

namespace niwaki {
namespace {

NIWAKI_MULTIVERSION
void subtract_scaled(float* y, const float* x, float factor, int64_t count) {
    for (int64_t i = 0; i < count; ++i) y[i] -= factor * x[i];
}

void sweep_row(const SweepCodes& sweep, int64_t row) {
    const int64_t columns = sweep.columns;
    float* wanted = sweep.wanted + row * columns;
    const float* base = sweep.has_base ? sweep.base + row * columns : nullptr;
    const float* scales = sweep.scale + row * sweep.groups;
    const float* offsets = sweep.offset + row * sweep.groups;
    const uint8_t* keep = sweep.keep ? sweep.keep + row * columns : nullptr;
    for (int64_t k = 0; k < columns; ++k) {
        const float scale = scales[sweep.group[k]], offset = offsets[sweep.group[k]];
        const float near = keep && !keep[k] ? 0.0f : wanted[k];
        const float code = std::min(std::max(std::nearbyint((near - offset) / scale), 0.0f), sweep.top[k]);
        const float change = code * scale + offset - (base ? base[k] : wanted[k]);
        sweep.code[row * columns + k] = static_cast<uint8_t>(code);
        sweep.change[row * columns + k] = change;
        if (change != 0.0f)
            subtract_scaled(wanted + k + 1, sweep.feed + k * columns + k + 1, change, columns - k - 1);
    }
}

}  // namespace

void sweep_codes(const SweepCodes& sweep, int threads) {
    over_rows(sweep.rows, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) sweep_row(sweep, row);
    });
}

}  // namespace niwaki
