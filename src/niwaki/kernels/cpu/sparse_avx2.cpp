// Products with nonzeros by AVX2: a byte of places per step, in seven instructions for one token and one more for each
// further token.

#include "sparse.h"

#ifdef NIWAKI_X86

#define NIWAKI_INLINE NIWAKI_AVX2 __attribute__((always_inline)) inline

namespace niwaki {
namespace {

// The ranks in the forms that spread values of each kind.
struct Tables {
    alignas(32) uint8_t high_halves[256][32];  // byte shuffle: 16-bit values to the upper halves of lanes
    alignas(32) uint8_t top_bytes[256][32];    // bytes to the top of lanes
    alignas(32) uint32_t shifts[256][8];       // left shift that brings a nibble to the top; 32 clears it
    alignas(16) uint8_t halves[256][16];       // 16-bit values side by side
};

Tables make_tables(SparseLayout layout) {
    const Ranks& from = ranks(layout);
    Tables made;
    std::memset(&made, 0x80, sizeof made);
    for (int byte = 0; byte < 256; ++byte)
        for (int i = 0; i < 8; ++i) {
            const uint8_t rank = from.rank[byte][i];
            made.shifts[byte][i] = rank == kAbsent ? 32 : 28 - 4 * rank;
            if (rank == kAbsent) continue;
            for (int half = 0; half < 2; ++half) {
                made.high_halves[byte][4 * i + 2 + half] = static_cast<uint8_t>(2 * rank + half);
                made.halves[byte][2 * i + half] = static_cast<uint8_t>(2 * rank + half);
            }
            made.top_bytes[byte][4 * i + 3] = rank;
        }
    return made;
}

const Tables& tables(SparseLayout layout) {
    static const Tables bitmap = make_tables(SparseLayout::bitmap), two_four = make_tables(SparseLayout::two_four);
    return layout == SparseLayout::bitmap ? bitmap : two_four;
}

// Position of the next value, in bytes. 4-bit codes of a bitmap may begin within a byte, so they count half bytes.
template <SparseLayout layout, SparseValues kind>
struct Cursor {
    static constexpr bool nibbles = layout == SparseLayout::bitmap && kind == SparseValues::int4;
    const uint8_t* values;
    uint64_t half;

    Cursor(const uint8_t* all, int64_t at) : values(all), half(0) {
        if (nibbles) half = static_cast<uint64_t>(at);
        else values += kind == SparseValues::int4 ? at >> 1 : at * size;
    }

    static constexpr int64_t size = kind == SparseValues::fp32 ? 4 : kind == SparseValues::int8 ? 1 : 2;

    // Advances past the values of one byte of places.
    NIWAKI_INLINE void pass(uint8_t byte) {
        if (nibbles) half += __builtin_popcount(byte);
        else if (layout == SparseLayout::bitmap) values += size * __builtin_popcount(byte);
        else values += kind == SparseValues::int4 ? 2 : 4 * size;
    }
};

// Returns eight weights from the next values. It may read up to 32 bytes.
template <SparseLayout layout, SparseValues kind>
NIWAKI_INLINE __m256 spread(const Cursor<layout, kind>& next, uint8_t byte, const Tables& t, const Ranks& r) {
    const uint8_t* values = next.values;
    if constexpr (kind == SparseValues::bf16) {
        const auto* from = reinterpret_cast<const __m128i*>(values);
        const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(from));
        const auto* how = reinterpret_cast<const __m256i*>(t.high_halves[byte]);
        return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, _mm256_load_si256(how)));
    } else if constexpr (kind == SparseValues::fp16) {
        const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        const auto* how = reinterpret_cast<const __m128i*>(t.halves[byte]);
        return _mm256_cvtph_ps(_mm_shuffle_epi8(eight, _mm_load_si128(how)));
    } else if constexpr (kind == SparseValues::fp32) {
        const __m256 eight = _mm256_loadu_ps(reinterpret_cast<const float*>(values));
        const auto* rank = reinterpret_cast<const __m128i*>(r.rank[byte]);
        const __m256i place = _mm256_cvtepu8_epi32(_mm_loadl_epi64(rank));
        const __m256i absent = _mm256_cmpeq_epi32(place, _mm256_set1_epi32(kAbsent));
        return _mm256_andnot_ps(_mm256_castsi256_ps(absent), _mm256_permutevar8x32_ps(eight, place));
    } else if constexpr (kind == SparseValues::int8) {
        int64_t eight;
        std::memcpy(&eight, values, sizeof eight);
        const auto* how = reinterpret_cast<const __m256i*>(t.top_bytes[byte]);
        const __m256i top = _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), _mm256_load_si256(how));
        return _mm256_cvtepi32_ps(top);
    } else {
        uint32_t nibbles;
        if constexpr (layout == SparseLayout::bitmap) {  // up to eight, from either half of a byte
            uint64_t word;
            std::memcpy(&word, values + (next.half >> 1), sizeof word);
            nibbles = static_cast<uint32_t>(word >> (4 * (next.half & 1)));
        } else {
            std::memcpy(&nibbles, values, sizeof nibbles);
        }
        const auto* how = reinterpret_cast<const __m256i*>(t.shifts[byte]);
        const __m256i all = _mm256_set1_epi32(static_cast<int>(nibbles));
        const __m256i top = _mm256_sllv_epi32(all, _mm256_load_si256(how));
        return _mm256_cvtepi32_ps(_mm256_and_si256(top, _mm256_set1_epi32(static_cast<int>(0xf0000000))));
    }
}

// Multiplies one row with N tokens. Separate sums for `steps` bytes hide the latency of additions.
template <SparseLayout layout, SparseValues kind, int N>
NIWAKI_AVX2 void row_avx2(const SparseProduct& p, int64_t row, int64_t token, const Tables& t, const Ranks& r) {
    constexpr int steps = N >= 8 ? 1 : N >= 4 ? 2 : 4;
    constexpr float top = kind == SparseValues::int8 ? 0x1p-24f : kind == SparseValues::int4 ? 0x1p-28f : 1.0f;
    const uint8_t* places = p.places + row * p.bytes;
    const float* x = p.x + token * p.bytes * 8;
    const int64_t stride = p.bytes * 8;
    Cursor<layout, kind> next(p.values, first_value(p, row));
    __m256 total[N];
    for (int n = 0; n < N; ++n) total[n] = _mm256_setzero_ps();
    for (int64_t group = 0; group < p.groups; ++group) {
        const int64_t end = std::min(p.bytes, (group + 1) * p.group_bytes);
        int64_t b = group * p.group_bytes;
        __m256 acc[steps][N];
        for (int s = 0; s < steps; ++s)
            for (int n = 0; n < N; ++n) acc[s][n] = _mm256_setzero_ps();
        for (; b + steps <= end; b += steps)
#pragma GCC unroll 4
            for (int s = 0; s < steps; ++s) {
                const uint8_t byte = places[b + s];
                const __m256 w = spread<layout, kind>(next, byte, t, r);
                next.pass(byte);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n)
                    acc[s][n] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + n * stride + 8 * (b + s)), acc[s][n]);
            }
        for (; b < end; ++b) {
            const __m256 w = spread<layout, kind>(next, places[b], t, r);
            next.pass(places[b]);
            for (int n = 0; n < N; ++n)
                acc[0][n] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + n * stride + 8 * b), acc[0][n]);
        }
        const float scale = p.scale ? top * _cvtsh_ss(p.scale[row * p.groups + group]) : 1.0f;
        for (int n = 0; n < N; ++n) {
            for (int s = 1; s < steps; ++s) acc[0][n] = _mm256_add_ps(acc[0][n], acc[s][n]);
            total[n] = _mm256_fmadd_ps(_mm256_set1_ps(scale), acc[0][n], total[n]);
        }
    }
    for (int n = 0; n < N; ++n) {
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(total[n]), _mm256_extractf128_ps(total[n], 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        p.out[(token + n) * p.rows + row] = _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
    }
}

template <SparseLayout layout, SparseValues kind>
NIWAKI_AVX2 void rows_avx2(const SparseProduct& p, int64_t first, int64_t last) {
    const Tables& t = tables(layout);
    const Ranks& r = ranks(layout);
    for (int64_t row = first; row < last; ++row) {
        int64_t n = 0;
        for (; n + 8 <= p.tokens; n += 8) row_avx2<layout, kind, 8>(p, row, n, t, r);
        for (; n + 4 <= p.tokens; n += 4) row_avx2<layout, kind, 4>(p, row, n, t, r);
        for (; n + 2 <= p.tokens; n += 2) row_avx2<layout, kind, 2>(p, row, n, t, r);
        for (; n < p.tokens; ++n) row_avx2<layout, kind, 1>(p, row, n, t, r);
    }
}

template <SparseLayout layout, SparseValues kind>
NIWAKI_AVX2 void decode_avx2(const SparseProduct& p, int64_t row, float* own) {
    constexpr float top = kind == SparseValues::int8 ? 0x1p-24f : kind == SparseValues::int4 ? 0x1p-28f : 1.0f;
    const Tables& t = tables(layout);
    const Ranks& r = ranks(layout);
    const uint8_t* places = p.places + row * p.bytes;
    Cursor<layout, kind> next(p.values, first_value(p, row));
    for (int64_t b = 0; b < p.bytes; ++b) {
        const float scale = p.scale ? top * half_to_float(p.scale[row * p.groups + b / p.group_bytes]) : 1.0f;
        const __m256 w = spread<layout, kind>(next, places[b], t, r);
        next.pass(places[b]);
        _mm256_storeu_ps(own + 8 * b, _mm256_mul_ps(_mm256_set1_ps(scale), w));
    }
}

template <SparseLayout layout, SparseValues kind>
constexpr SparseKernels kAvx2{rows_avx2<layout, kind>, decode_avx2<layout, kind>};

template <SparseLayout layout>
SparseKernels of_kind(SparseValues kind) {
    switch (kind) {
        case SparseValues::bf16: return kAvx2<layout, SparseValues::bf16>;
        case SparseValues::fp16: return kAvx2<layout, SparseValues::fp16>;
        case SparseValues::fp32: return kAvx2<layout, SparseValues::fp32>;
        case SparseValues::int8: return kAvx2<layout, SparseValues::int8>;
        case SparseValues::int4: break;
    }
    return kAvx2<layout, SparseValues::int4>;
}

}  // namespace

SparseKernels sparse_avx2(SparseLayout layout, SparseValues kind) {
    return layout == SparseLayout::bitmap ? of_kind<SparseLayout::bitmap>(kind) : of_kind<SparseLayout::two_four>(kind);
}

}  // namespace niwaki

#endif
