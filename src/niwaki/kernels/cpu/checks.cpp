// Checks of the values of a matrix: those that kernels use as positions, and those that its format does not allow. Each
// is one pass at the bandwidth of the memory: sums over words without branches, which the compiler turns into vectors.

#include "checks.h"

namespace niwaki {
namespace {

constexpr int64_t kSlack = 64;   // bytes after the values that kernels may read
constexpr int64_t kTile = 32;    // rows of a tile, and bytes of a line of places in it
constexpr int64_t kBlock = 4096;  // bytes between two looks at what was found: a bad record ends early

template <typename Word>
inline Word word_at(const uint8_t* bytes) {  // a tensor of a file may begin at any byte
    Word word;
    std::memcpy(&word, bytes, sizeof word);
    return word;
}

inline int64_t set_bits(const uint8_t* bytes, int64_t count) {
    int64_t found = 0, next = 0, at = 0;
    for (; at + 16 <= count; at += 16) {  // two sums: one would wait for itself
        found += __builtin_popcountll(word_at<uint64_t>(bytes + at));
        next += __builtin_popcountll(word_at<uint64_t>(bytes + at + 8));
    }
    for (; at < count; ++at) found += __builtin_popcount(bytes[at]);
    return found + next;
}

// An exponent of all ones overflows into the sign when its lowest bit is added.
NIWAKI_MULTIVERSION bool finite_16(const uint8_t* bytes, int64_t count, uint16_t exponent) {
    const auto lowest = static_cast<uint16_t>(exponent & -exponent);
    uint16_t over = 0;
    for (int64_t i = 0; i < count; ++i)
        over |= static_cast<uint16_t>((word_at<uint16_t>(bytes + 2 * i) & exponent) + lowest);
    return !(over & 0x8000);
}

NIWAKI_MULTIVERSION bool finite_32(const uint8_t* bytes, int64_t count) {
    uint32_t over = 0;
    for (int64_t i = 0; i < count; ++i) over |= (word_at<uint32_t>(bytes + 4 * i) & 0x7f800000u) + 0x00800000u;
    return !(over & 0x80000000u);
}

// Bit n is set if the index of two bits at n is less than the one `step` bits above it.
inline uint64_t ascending(uint64_t word, int step) {
    const uint64_t low = word, high = word >> 1, next_low = word >> step, next_high = word >> (step + 1);
    return (next_high & ~high) | (~(high ^ next_high) & next_low & ~low);
}

NIWAKI_MULTIVERSION uint64_t ascending_everywhere(const uint8_t* places, int64_t words) {
    uint64_t found = ~uint64_t{0};
    for (int64_t i = 0; i < words; ++i) found &= ascending(word_at<uint64_t>(places + 8 * i), 2);
    return found;
}

constexpr int64_t kWide = 8;  // words

// The bits that ascend in all lines of a tile, for each of its four words.
NIWAKI_MULTIVERSION void ascending_lines(const uint8_t* places, int64_t lines, uint64_t* found) {
    uint64_t own[kWide];  // of two lines: as wide as the widest vectors
    std::fill_n(own, kWide, ~uint64_t{0});
    for (; lines >= 2; lines -= 2, places += 2 * kTile)
        for (int64_t i = 0; i < kWide; ++i) own[i] &= ascending(word_at<uint64_t>(places + 8 * i), 8);
    for (int64_t i = 0; i < 4; ++i) {
        found[i] = own[i] & own[i + 4];
        if (lines) found[i] &= ascending(word_at<uint64_t>(places + 8 * i), 8);
    }
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
        // Only the last rows need a count: others stay inside with a value in every column.
        const bool inside = first >= 0 && first <= room &&
            (8 * p.bytes <= room - first || set_bits(p.places + row * p.bytes, p.bytes) <= room - first);
        require(inside, "starts and places point after the values");
    }
}

bool all_finite(const uint8_t* bytes, int64_t count, SparseValues kind) {
    const int64_t width = kind == SparseValues::fp32 ? 4 : 2, step = kBlock / width;
    for (int64_t first = 0; first < count; first += step) {
        const int64_t some = std::min(step, count - first);
        const uint8_t* from = bytes + first * width;
        if (width == 4 ? !finite_32(from, some) : !finite_16(from, some, kind == SparseValues::bf16 ? 0x7f80 : 0x7c00))
            return false;
    }
    return true;
}

bool pairs_ascend(const uint8_t* places, int64_t count) {
    constexpr uint64_t kFirstOfFour = 0x1111111111111111;
    for (int64_t first = 0; first < count / 8; first += kBlock / 8)
        if (~ascending_everywhere(places + 8 * first, std::min(kBlock / 8, count / 8 - first)) & kFirstOfFour)
            return false;
    for (int64_t at = count / 8 * 8; at < count; ++at)
        if (~ascending(places[at], 2) & 0x11) return false;
    return true;
}

bool tile_pairs_ascend(const uint8_t* places, int64_t lines, int64_t rows) {
    for (int64_t first = 0; first < rows; first += kTile, places += lines * kTile) {
        uint64_t found[4];
        ascending_lines(places, lines, found);
        for (int64_t lane = 0; lane < kTile / 2; ++lane) {  // row `lane` has bits 0 and 4, row 16 + lane bits 2 and 6
            const uint64_t needed = (first + lane < rows ? 0x11 : 0) | (first + kTile / 2 + lane < rows ? 0x44 : 0);
            if (~(found[lane / 4] >> (16 * (lane % 4))) & needed) return false;
        }
    }
    return true;
}

NIWAKI_MULTIVERSION BitmapScan scan_bitmap(const uint8_t* places, int64_t rows, int64_t columns, const int32_t* starts) {
    const int64_t bytes = ceil_div(columns, 8), used = columns % 8 ? columns % 8 : 8;
    BitmapScan found{0, false, true};
    for (int64_t row = 0; row < rows; ++row, places += bytes) {
        found.ordered = found.ordered && starts[row] == found.count;
        found.count += set_bits(places, bytes);
        found.beyond = found.beyond || places[bytes - 1] >> used;
    }
    return found;
}

}  // namespace niwaki
