// Products of bfloat16 nonzeros and inputs by AVX-512 with VBMI2 and BF16: one instruction spreads 32 columns, and one
// more for each token multiplies and adds them.

#include "sparse.h"

#ifdef NIWAKI_X86

#define NIWAKI_INLINE NIWAKI_BF16 __attribute__((always_inline)) inline

namespace niwaki {
namespace {

// The columns with a value, for every byte of places. The pairs of two-four ascend, so masks serve both layouts.
struct Masks {
    uint8_t columns[256];
};

const Masks& two_four_masks() {
    static const Masks made = [] {
        Masks of{};
        for (int byte = 0; byte < 256; ++byte)
            for (int i = 0; i < 8; ++i) of.columns[byte] |= (ranks(SparseLayout::two_four).rank[byte][i] != kAbsent) << i;
        return of;
    }();
    return made;
}

// Returns the next weights of `width` bytes of places (at most 32 columns) as bfloat16. It may read 64 bytes.
template <SparseLayout layout>
NIWAKI_INLINE __m512i wide_spread(const uint8_t*& values, const uint8_t* places, int64_t width, const Masks& m) {
    uint32_t mask = 0;
    if (layout == SparseLayout::bitmap) std::memcpy(&mask, places, width);
    else
        for (int64_t i = 0; i < width; ++i) mask |= static_cast<uint32_t>(m.columns[places[i]]) << (8 * i);
    __m512i all = _mm512_loadu_si512(values);
    asm("" : "+v"(all));  // keeps the load apart: one instruction with a memory operand takes several times as long
    values += layout == SparseLayout::bitmap ? 2 * __builtin_popcount(mask) : 8 * width;
    return _mm512_maskz_expand_epi16(mask, all);
}

// Multiplies R rows with N tokens, 32 columns at a time. The processor adds the products of pairs in float32. Rows share
// the loads of inputs, which come from a farther cache for several tokens. A second chain of sums, if there are few, hides
// the latency of additions.
template <SparseLayout layout, int R, int N>
NIWAKI_BF16 void rows_bf16(const SparseProduct& p, int64_t row, int64_t token, const Masks& m) {
    constexpr int chains = R * N >= 8 ? 1 : 2;
    const uint8_t *places[R], *values[R];
    for (int r = 0; r < R; ++r) {
        places[r] = p.places + (row + r) * p.bytes;
        values[r] = p.values + 2 * first_value(p, row + r);
    }
    const uint16_t* x = p.narrow + token * p.narrow_columns;
    __m512 sums[chains][R][N];
    for (auto& chain : sums)
        for (auto& own : chain)
            for (__m512& sum : own) sum = _mm512_setzero_ps();
    const auto add = [&](int64_t b, int64_t width, __m512(&to)[R][N]) NIWAKI_BF16 __attribute__((always_inline)) {
        __m512bh w[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) w[r] = (__m512bh)wide_spread<layout>(values[r], places[r] + b, width, m);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            const auto own = (__m512bh)_mm512_loadu_si512(x + n * p.narrow_columns + 8 * b);
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) to[r][n] = _mm512_dpbf16_ps(to[r][n], w[r], own);
        }
    };
    int64_t b = 0;
    for (; b + 4 * chains <= p.bytes; b += 4 * chains)
#pragma GCC unroll 2
        for (int chain = 0; chain < chains; ++chain) add(b + 4 * chain, 4, sums[chain]);
    for (; b < p.bytes; b += 4) add(b, std::min<int64_t>(4, p.bytes - b), sums[0]);
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) {
            __m512 sum = sums[0][r][n];
            if (chains == 2) sum = _mm512_add_ps(sum, sums[chains - 1][r][n]);
            p.out[(token + n) * p.rows + row + r] = _mm512_reduce_add_ps(sum);
        }
}

// Eight tokens take two rows at a time. For fewer tokens a second stream of values costs more than it saves.
template <SparseLayout layout>
NIWAKI_BF16 void rows_bf16(const SparseProduct& p, int64_t first, int64_t last) {
    const Masks& m = two_four_masks();
    const int64_t eights = p.tokens / 8 * 8, pairs = eights ? (last - first) / 2 * 2 : 0;
    for (int64_t row = first; row < first + pairs; row += 2)
        for (int64_t n = 0; n < eights; n += 8) rows_bf16<layout, 2, 8>(p, row, n, m);
    for (int64_t row = first; row < last; ++row) {
        int64_t n = row < first + pairs ? eights : 0;
        for (; n + 4 <= p.tokens; n += 4) rows_bf16<layout, 1, 4>(p, row, n, m);
        for (; n + 2 <= p.tokens; n += 2) rows_bf16<layout, 1, 2>(p, row, n, m);
        for (; n < p.tokens; ++n) rows_bf16<layout, 1, 1>(p, row, n, m);
    }
}

// Writes a row in bfloat16, its stored type.
template <SparseLayout layout>
NIWAKI_BF16 void decode_bf16(const SparseProduct& p, int64_t row, uint16_t* out, int64_t columns) {
    const Masks& m = two_four_masks();
    const uint8_t* places = p.places + row * p.bytes;
    const uint8_t* values = p.values + 2 * first_value(p, row);
    int64_t b = 0;
    for (; 8 * b + 32 <= columns; b += 4) _mm512_storeu_si512(out + 8 * b, wide_spread<layout>(values, places + b, 4, m));
    if (b < p.bytes)
        _mm512_mask_storeu_epi16(out + 8 * b, (__mmask32(1) << (columns - 8 * b)) - 1,
                                 wide_spread<layout>(values, places + b, p.bytes - b, m));
}

}  // namespace

SparseBf16 sparse_bf16(SparseLayout layout) {
    if (layout == SparseLayout::bitmap) return {rows_bf16<SparseLayout::bitmap>, decode_bf16<SparseLayout::bitmap>};
    return {rows_bf16<SparseLayout::two_four>, decode_bf16<SparseLayout::two_four>};
}

}  // namespace niwaki

#endif
