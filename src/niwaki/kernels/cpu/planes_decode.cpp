// Decoding of matrices stored as bit planes (formats/quantized.py: pack_planes), for products of many tokens: by GFNI
// (planes_decode_gfni.cpp), or in portable code row by row, eight codes in a word.

#include "planes_decode.h"

namespace niwaki {
namespace {

constexpr int64_t kTile = 32;  // rows of a tile

// Eight bytes for every byte of a plane, one for each of its bits.
struct Spread {
    uint64_t of[256];
};

const Spread& spread() {
    static const Spread made = [] {
        Spread found{};
        for (int byte = 0; byte < 256; ++byte) {
            uint8_t bits[8];
            for (int i = 0; i < 8; ++i) bits[i] = byte >> i & 1;
            std::memcpy(&found.of[byte], bits, sizeof bits);
        }
        return found;
    }();
    return made;
}

// Writes the columns of one part to a row of the matrix. Planes are added up eight codes at a time.
NIWAKI_MULTIVERSION void decode_row(const PlaneProduct& p, int64_t row, const uint64_t* spread, float* own) {
    const uint8_t* planes = p.planes + row / kTile * p.bits * p.bytes * kTile + row % kTile;
    for (int64_t group = 0; group < p.groups; ++group) {
        const int64_t at = group * p.rows + row;
        const float scale = half_to_float(p.scale[at]);
        const float offset = p.offset ? half_to_float(p.offset[at]) : -(p.zero ? p.zero[at] : p.centre) * scale;
        for (int64_t b = group * p.group_bytes; b < std::min(p.bytes, (group + 1) * p.group_bytes); ++b) {
            uint64_t codes = 0;
            for (int64_t k = 0; k < p.bits; ++k) codes |= spread[planes[(k * p.bytes + b) * kTile]] << k;
            uint8_t code[8];
            std::memcpy(code, &codes, sizeof code);
            float value[8];
            for (int i = 0; i < 8; ++i) value[i] = static_cast<float>(code[i]) * scale + offset;
            const int64_t count = std::min<int64_t>(8, p.columns - 8 * b);
            if (p.column)
                for (int64_t i = 0; i < count; ++i) own[p.column[8 * b + i]] = value[i];
            else std::memcpy(own + 8 * b, value, sizeof(float) * count);
        }
    }
}

}  // namespace

void plane_decode(const std::vector<PlaneProduct>& parts, const Decoded& to, int threads, Path path) {
#ifdef NIWAKI_X86
    if (takes_gfni(parts, to, path)) return plane_decode_gfni(parts, to, threads);
#endif
    const uint64_t* table = spread().of;
    over_rows(to.last - to.first, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> own(to.columns);
        for (int64_t row = begin; row < end; ++row) {
            for (const PlaneProduct& p : parts) decode_row(p, to.first + row, table, own.data());
            put_row(to, row, own.data());
        }
    });
}

}  // namespace niwaki
