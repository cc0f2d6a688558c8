// Products with matrices stored as their nonzeros (sparse.py): a byte of places says where the values of eight columns
// belong, and a table turns it into one shuffle that spreads them over eight lanes. Sums are float32.
//
// A bitmap and the 2-bit indices of two-four differ only in the table, and in how far the values move on. Codes of 4 and
// 8 bits are spread to the top of a lane, where they are signed numbers: absent ones are zero without a mask.
//
// Three paths: AVX-512 with VBMI2 and BF16 where weights and inputs are bfloat16 (one instruction spreads 32 columns, one
// more for each token multiplies and adds them), AVX2 (a byte a step, seven instructions for one token and one more for
// each other), and portable code.

#include "kernels.h"

#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define NIWAKI_X86 1
#include <immintrin.h>
#define NIWAKI_AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
#define NIWAKI_INLINE __attribute__((target("avx2,fma,f16c,popcnt"), always_inline)) inline
#define NIWAKI_BF16 __attribute__((target("avx512f,avx512bw,avx512vbmi2,avx512bf16,popcnt")))
#define NIWAKI_INLINE_BF16 NIWAKI_BF16 __attribute__((always_inline)) inline
#endif

namespace niwaki {
namespace {

constexpr int kAbsent = 255;

// Of every byte of places: how many values it takes, and which of them each of its eight columns gets.
struct Ranks {
    uint8_t rank[256][8];
    uint8_t count[256];
};

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

const Ranks& ranks(SparseLayout layout) {
    static const Ranks bitmap = make_ranks(SparseLayout::bitmap), two_four = make_ranks(SparseLayout::two_four);
    return layout == SparseLayout::bitmap ? bitmap : two_four;
}

// Value number `at` as it is stored.
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

int64_t first_value(const SparseProduct& p, int64_t row) { return p.starts ? p.starts[row] : 4 * row * p.bytes; }

// A row of the matrix, [8 · bytes].
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

#ifdef NIWAKI_X86
// The ranks as what spreads values of one kind.
struct Tables {
    alignas(32) uint8_t high_halves[256][32];  // byte shuffle: 16-bit values to the upper halves of lanes
    alignas(32) uint8_t top_bytes[256][32];    // bytes to the top of lanes
    alignas(32) uint32_t shifts[256][8];       // left shift that brings a nibble to the top; 32 leaves nothing
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

// Where the next value is: a byte, and of 4-bit codes in a bitmap, which may begin within one, half bytes beyond it.
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

    // Passes what one byte of places takes.
    NIWAKI_INLINE void pass(uint8_t byte) {
        if (nibbles) half += __builtin_popcount(byte);
        else if (layout == SparseLayout::bitmap) values += size * __builtin_popcount(byte);
        else values += kind == SparseValues::int4 ? 2 : 4 * size;
    }
};

// Eight weights from the next values. They may be read up to 32 bytes further.
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
        if constexpr (layout == SparseLayout::bitmap) {  // up to eight, from either half of a byte on
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

// One row and N tokens. `steps` bytes at a time have sums of their own, which hides the latency of additions.
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

// The columns of every byte of places that have a value: the pairs of two-four ascend, so both layouts are masks here.
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

// The next weights of `width` bytes of places, at most 32 columns, as bfloat16; 64 bytes from the first may be read.
template <SparseLayout layout>
NIWAKI_INLINE_BF16 __m512i wide_spread(const uint8_t*& values, const uint8_t* places, int64_t width, const Masks& m) {
    uint32_t mask = 0;
    if (layout == SparseLayout::bitmap) std::memcpy(&mask, places, width);
    else
        for (int64_t i = 0; i < width; ++i) mask |= static_cast<uint32_t>(m.columns[places[i]]) << (8 * i);
    __m512i all = _mm512_loadu_si512(values);
    asm("" : "+v"(all));  // apart from what spreads it: as one instruction they take several times as long
    values += layout == SparseLayout::bitmap ? 2 * __builtin_popcount(mask) : 8 * width;
    return _mm512_maskz_expand_epi16(mask, all);
}

// R rows and N tokens, 32 columns at a time, products of pairs added in float32 by the processor. Rows share the loads of
// inputs, which for several tokens come from a cache further away; few sums are kept twice, which hides the latency of
// additions.
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

// Eight tokens take two rows at a time; for fewer a second stream of values costs more than it saves.
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

// A row as the bfloat16 that it is stored as.
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

// What is there for one layout and kind of values.
struct Avx2 {
    void (*rows)(const SparseProduct&, int64_t, int64_t);
    void (*decode)(const SparseProduct&, int64_t, float*);
};

template <SparseLayout layout, SparseValues kind>
constexpr Avx2 kAvx2{rows_avx2<layout, kind>, decode_avx2<layout, kind>};

template <SparseLayout layout>
Avx2 avx2_of(SparseValues kind) {
    switch (kind) {
        case SparseValues::bf16: return kAvx2<layout, SparseValues::bf16>;
        case SparseValues::fp16: return kAvx2<layout, SparseValues::fp16>;
        case SparseValues::fp32: return kAvx2<layout, SparseValues::fp32>;
        case SparseValues::int8: return kAvx2<layout, SparseValues::int8>;
        case SparseValues::int4: break;
    }
    return kAvx2<layout, SparseValues::int4>;
}

Avx2 avx2_of(const SparseProduct& p) {
    return p.layout == SparseLayout::bitmap ? avx2_of<SparseLayout::bitmap>(p.kind)
                                            : avx2_of<SparseLayout::two_four>(p.kind);
}

bool wide(const SparseProduct& p, Path path) {
    return p.kind == SparseValues::bf16 && (path == Path::best || path == Path::bf16) && supported(Path::bf16);
}
#endif

}  // namespace

void sparse_product(const SparseProduct& p, int threads, Path path) {
    void (*rows)(const SparseProduct&, int64_t, int64_t) = rows_portable;
#ifdef NIWAKI_X86
    if (path != Path::portable && supported(Path::avx2)) rows = avx2_of(p).rows;
    if (p.narrow && wide(p, path))
        rows = p.layout == SparseLayout::bitmap ? rows_bf16<SparseLayout::bitmap> : rows_bf16<SparseLayout::two_four>;
#endif
    over_rows(p.rows, threads, [&](int64_t first, int64_t last) { rows(p, first, last); });
}

void sparse_decode(const SparseProduct& p, const Decoded& to, int threads, Path path) {
    auto decode = decode_portable;
    bool straight = false;
#ifdef NIWAKI_X86
    if (path != Path::portable && supported(Path::avx2)) decode = avx2_of(p).decode;
    straight = to.bfloat16 && wide(p, path);
#endif
    over_rows(to.last - to.first, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> own(straight ? 0 : p.bytes * 8);
        for (int64_t row = begin; row < end; ++row) {
#ifdef NIWAKI_X86
            if (straight) {
                auto* out = static_cast<uint16_t*>(to.out) + row * to.columns;
                p.layout == SparseLayout::bitmap
                    ? decode_bf16<SparseLayout::bitmap>(p, to.first + row, out, to.columns)
                    : decode_bf16<SparseLayout::two_four>(p, to.first + row, out, to.columns);
                continue;
            }
#endif
            decode(p, to.first + row, own.data());
            put_row(to, row, own.data());
        }
    });
}

}  // namespace niwaki
