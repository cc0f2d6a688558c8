// Products with kept inputs by AVX-512. Codes need its VNNI.

#include "inputs.h"

#ifdef NIWAKI_X86

namespace niwaki {
namespace {

constexpr int64_t kWidth = 16;  // floats of a register

struct Bf16 {
    static constexpr SparseValues kind = SparseValues::bf16;
    static constexpr int64_t bytes = 2;
    NIWAKI_AVX512 static __m512 load(const uint8_t* from) {
        const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
    }
};

struct Fp16 {
    static constexpr SparseValues kind = SparseValues::fp16;
    static constexpr int64_t bytes = 2;
    NIWAKI_AVX512 static __m512 load(const uint8_t* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
};

struct Fp32 {
    static constexpr SparseValues kind = SparseValues::fp32;
    static constexpr int64_t bytes = 4;
    NIWAKI_AVX512 static __m512 load(const uint8_t* from) { return _mm512_loadu_ps(from); }
};

// Adds `count` rows to the outputs that fill registers, one line of memory of each row per step.
template <typename Values, int count>
NIWAKI_AVX512 inline void add_some(const KeptRows& rows, int64_t done, int64_t outputs, float* sums) {
    constexpr int64_t line = 64 / Values::bytes;
    const uint8_t *row[count], *next[count];
    __m512 value[count];
    for (int r = 0; r < count; ++r) {
        row[r] = rows.weight + rows.input[done + r] * rows.row_bytes;
        next[r] = done + r + count < rows.listed ? rows.weight + rows.input[done + r + count] * rows.row_bytes : row[r];
        value[r] = _mm512_set1_ps(rows.value[done + r]);
    }
    for (int64_t o = 0; o + line <= outputs; o += line) {
        __m512 sum[line / kWidth];
        for (int64_t i = 0; i < line / kWidth; ++i) sum[i] = _mm512_loadu_ps(sums + o + i * kWidth);
#pragma GCC unroll 8
        for (int r = 0; r < count; ++r) {
            _mm_prefetch(reinterpret_cast<const char*>(next[r] + o * Values::bytes), _MM_HINT_T1);
            for (int64_t i = 0; i < line / kWidth; ++i)
                sum[i] = _mm512_fmadd_ps(value[r], Values::load(row[r] + (o + i * kWidth) * Values::bytes), sum[i]);
        }
        for (int64_t i = 0; i < line / kWidth; ++i) _mm512_storeu_ps(sums + o + i * kWidth, sum[i]);
    }
}

template <typename Values>
NIWAKI_AVX512 void add_rows(const KeptRows& rows, int64_t outputs, float* sums) {
    int64_t done = 0;
    for (; done + kPass <= rows.count; done += kPass) add_some<Values, kPass>(rows, done, outputs, sums);
    if (done + 4 <= rows.count) add_some<Values, 4>(rows, done, outputs, sums), done += 4;
    for (; done < rows.count; ++done) add_some<Values, 1>(rows, done, outputs, sums);
    add_rest(rows, Values::kind, outputs / (64 / Values::bytes) * (64 / Values::bytes), outputs, sums);
}

NIWAKI_AVX512 void finish(const RunLevels& levels, int64_t blocks, int32_t* sums, float* out) {
    const __m512 total = _mm512_set1_ps(levels.total), shift = _mm512_set1_ps(levels.shift);
    const __m512 factor[2] = {_mm512_set1_ps(levels.factor), _mm512_set1_ps(levels.factor / 16)};
    for (int64_t o = 0; o < blocks * kCodeOutputs; o += kWidth) {
        const __m512 sum =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums + o)), factor[o / kWidth & 1], shift);
        const __m512 scale = Fp16::load(reinterpret_cast<const uint8_t*>(levels.scale + o));
        __m512 result = _mm512_loadu_ps(out + o);
        if (levels.offset) {
            const __m512 offset = Fp16::load(reinterpret_cast<const uint8_t*>(levels.offset + o));
            result = _mm512_fmadd_ps(scale, sum, _mm512_fmadd_ps(offset, total, result));
        } else {
            const __m512 zero = levels.zero ? _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(
                                                  reinterpret_cast<const __m128i*>(levels.zero + o))))
                                            : _mm512_set1_ps(levels.centre);
            result = _mm512_fmadd_ps(scale, _mm512_fnmadd_ps(zero, total, sum), result);
        }
        _mm512_storeu_ps(out + o, result);
        _mm512_storeu_si512(sums + o, _mm512_setzero_si512());
    }
}

// Adds `count` pairs of rows, one line of memory of each row per step. Words of two rows side by side hold the codes of
// four outputs.
template <int count>
NIWAKI_VBMI inline void add_some_pairs(const KeptPairs& p, int64_t done, int64_t blocks, int32_t* sums) {
    const __m512i lower = _mm512_set1_epi16(0x0f), upper = _mm512_set1_epi16(0xf0);
    const uint8_t *row[2 * count], *next[2 * count];
    __m512i value[count];
    for (int r = 0; r < 2 * count; ++r) {
        const bool more = done + count + r / 2 < p.listed;
        row[r] = p.codes + p.input[2 * done + r] * p.row_bytes;
        next[r] = more ? p.codes + p.input[2 * (done + count) + r] * p.row_bytes : row[r];
        value[r / 2] = _mm512_set1_epi32(p.value[done + r / 2]);
    }
    for (int64_t b = 0; b < blocks; ++b) {
        int32_t* own = sums + b * kCodeOutputs;
        __m512i sum[8];
        for (int i = 0; i < 8; ++i) sum[i] = _mm512_loadu_si512(own + i * kWidth);
#pragma GCC unroll 4
        for (int k = 0; k < count; ++k) {
            const __m512i one = _mm512_loadu_si512(row[2 * k] + b * kCodeBytes);
            const __m512i two = _mm512_loadu_si512(row[2 * k + 1] + b * kCodeBytes);
            _mm_prefetch(reinterpret_cast<const char*>(next[2 * k] + b * kCodeBytes), _MM_HINT_T1);
            _mm_prefetch(reinterpret_cast<const char*>(next[2 * k + 1] + b * kCodeBytes), _MM_HINT_T1);
            const __m512i words[2] = {_mm512_unpacklo_epi16(one, two), _mm512_unpackhi_epi16(one, two)};
            for (int h = 0; h < 2; ++h) {
                const __m512i rest = _mm512_srli_epi16(words[h], 8);
                const __m512i codes[4] = {_mm512_and_si512(words[h], lower), _mm512_and_si512(words[h], upper),
                                          _mm512_and_si512(rest, lower), _mm512_and_si512(rest, upper)};
                for (int i = 0; i < 4; ++i) sum[4 * h + i] = _mm512_dpwssd_epi32(sum[4 * h + i], codes[i], value[k]);
            }
        }
        for (int i = 0; i < 8; ++i) _mm512_storeu_si512(own + i * kWidth, sum[i]);
    }
}

NIWAKI_VBMI void add_pairs(const KeptPairs& p, int64_t blocks, int32_t* sums) {
    int64_t done = 0;
    for (; done + 4 <= p.count; done += 4) add_some_pairs<4>(p, done, blocks, sums);
    for (; done < p.count; ++done) add_some_pairs<1>(p, done, blocks, sums);
}

}  // namespace

const InputKernels kInputsAvx512 = {{add_rows<Bf16>, add_rows<Fp16>, add_rows<Fp32>}, add_pairs, finish};

}  // namespace niwaki

#endif
