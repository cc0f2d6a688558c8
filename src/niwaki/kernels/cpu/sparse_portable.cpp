// Products with nonzeros in portable code: a row is decoded to float32, then multiplied.

#include "sparse.h"

namespace niwaki {
namespace {

Ranks make_ranks(SparseLayout layout) {
    Ranks found{};
    for (int byte = 0; byte < 256; ++byte) {
        int next = 0;
        for (int column = 0; column < 8; ++column) found.rank[byte][column] = kAbsent;
        if (layout == SparseLayout::bitmap) {
            for (int column = 0; column < 8; ++column)
                if (byte >> column & 1) found.rank[byte][column] = static_cast<uint8_t>(next++);
        } else {
            for (; next < 4; ++next)
                found.rank[byte][4 * (next / 2) + (byte >> (2 * next) & 3)] = static_cast<uint8_t>(next);
        }
        found.count[byte] = static_cast<uint8_t>(next);
    }
    return found;
}


// Returns the stored value number `at`, without its scale.
float value_of(const SparseProduct& p, int64_t at) {
    uint16_t half;
    uint32_t word;
    float value;
    switch (p.kind) {
        case SparseValues::bf16:
            std::memcpy(&half, p.values + 2 * at, 2);
            word = static_cast<uint32_t>(half) << 16;
            std::memcpy(&value, &word, 4);
            return value;
        case SparseValues::fp16:
            std::memcpy(&half, p.values + 2 * at, 2);
            return half_to_float(half);
        case SparseValues::fp32:
            std::memcpy(&value, p.values + 4 * at, 4);
            return value;
        case SparseValues::int8: return static_cast<float>(static_cast<int8_t>(p.values[at]));
        case SparseValues::int4: break;
    }
    const int code = p.values[at / 2] >> (4 * (at & 1)) & 15;
    return static_cast<float>(code < 8 ? code : code - 16);
}

// Writes a row of the matrix: [8 · bytes].
void decode_portable(const SparseProduct& p, int64_t row, float* own) {
    const Ranks& table = ranks(p.layout);
    int64_t at = first_value(p, row);
    for (int64_t b = 0; b < p.bytes; ++b) {
        const uint8_t byte = p.places[row * p.bytes + b];
        const float scale = p.scale ? half_to_float(p.scale[row * p.groups + b / p.group_bytes]) : 1;
        for (int64_t i = 0; i < 8; ++i) {
            const uint8_t rank = table.rank[byte][i];
            own[8 * b + i] = rank == kAbsent ? 0 : scale * value_of(p, at + rank);
        }
        at += table.count[byte];
    }
}

void rows_portable(const SparseProduct& p, int64_t first, int64_t last) {
    std::vector<float> own(p.bytes * 8);
    for (int64_t row = first; row < last; ++row) {
        decode_portable(p, row, own.data());
        for (int64_t n = 0; n < p.tokens; ++n) {
            float sum = 0;
            const float* x = p.x + n * p.bytes * 8;
            for (int64_t i = 0; i < p.bytes * 8; ++i) sum += own[i] * x[i];
            p.out[n * p.rows + row] = sum;
        }
    }
}

}  // namespace

const Ranks& ranks(SparseLayout layout) {
    static const Ranks bitmap = make_ranks(SparseLayout::bitmap), two_four = make_ranks(SparseLayout::two_four);
    return layout == SparseLayout::bitmap ? bitmap : two_four;
}

const SparseKernels kSparsePortable{rows_portable, decode_portable};

}  // namespace niwaki
