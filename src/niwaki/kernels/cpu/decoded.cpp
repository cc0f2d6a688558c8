// Output of decoded rows, as float32 or bfloat16.

#include "kernels.h"

namespace niwaki {
namespace {

NIWAKI_MULTIVERSION void narrow_all(const float* from, uint16_t* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = narrowed(from[i]);
}

}  // namespace

void put_row(const Decoded& to, int64_t row, const float* own) {
    if (to.bfloat16) return narrow_all(own, static_cast<uint16_t*>(to.out) + row * to.columns, to.columns);
    std::memcpy(static_cast<float*>(to.out) + row * to.columns, own, sizeof(float) * to.columns);
}

}  // namespace niwaki
