// Checks of the values of a matrix that kernels use as positions.

#include "checks.h"

namespace niwaki {
namespace {

constexpr int64_t kSlack = 64;  // bytes after the values that kernels may read

NIWAKI_MULTIVERSION int64_t set_bits(const uint8_t* bytes, int64_t count) {
    int64_t found = 0, at = 0;
    for (; at + 8 <= count; at += 8) {
        uint64_t word;
        std::memcpy(&word, bytes + at, sizeof word);
        found += __builtin_popcountll(word);
    }
    for (; at < count; ++at) found += __builtin_popcount(bytes[at]);
    return found;
}

}  // namespace

void require_values(const SparseProduct& p, int64_t value_bytes) {
    const int64_t bits = p.kind == SparseValues::int4 ? 4 : p.kind == SparseValues::int8 ? 8
                       : p.kind == SparseValues::fp32 ? 32 : 16;
    require(value_bytes >= kSlack, "values are shorter than their slack");
    const int64_t room = (value_bytes - kSlack) * 8 / bits;  // whole values before the slack
    if (!p.starts) return require(4 * p.rows * p.bytes <= room, "values are too short for the rows");
    for (int64_t row = 0; row < p.rows; ++row) {
        const int64_t first = p.starts[row];
        require(first >= 0 && first <= room && set_bits(p.places + row * p.bytes, p.bytes) <= room - first,
                "starts and places point after the values");
    }
}

}  // namespace niwaki
