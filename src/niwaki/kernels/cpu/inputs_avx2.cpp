// Products with kept inputs by AVX2.

#include "inputs.h"

#ifdef NIWAKI_X86

namespace niwaki {
namespace {

constexpr int64_t kWidth = 8;  // floats of a register

struct Bf16 {
    static constexpr SparseValues kind = SparseValues::bf16;
    static constexpr int64_t bytes = 2;
    NIWAKI_AVX2 static __m256 load(const uint8_t* from) {
        const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
    }
};

struct Fp16 {
    static constexpr SparseValues kind = SparseValues::fp16;
    static constexpr int64_t bytes = 2;
    NIWAKI_AVX2 static __m256 load(const uint8_t* from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
};

struct Fp32 {
    static constexpr SparseValues kind = SparseValues::fp32;
    static constexpr int64_t bytes = 4;
    NIWAKI_AVX2 static __m256 load(const uint8_t* from) { return _mm256_loadu_ps(reinterpret_cast<const float*>(from)); }
};

// Adds `count` rows to the outputs that fill registers, two registers per step.
template <typename Values, int count>
NIWAKI_AVX2 inline void add_some(const KeptRows& rows, int64_t done, int64_t outputs, float* sums) {
    const uint8_t *row[count], *next[count];
    for (int r = 0; r < count; ++r) {
        row[r] = rows.weight + rows.input[done + r] * rows.row_bytes;
        next[r] = done + r + count < rows.listed ? rows.weight + rows.input[done + r + count] * rows.row_bytes : row[r];
    }
    for (int64_t o = 0; o + 2 * kWidth <= outputs; o += 2 * kWidth) {
        __m256 lower = _mm256_loadu_ps(sums + o), upper = _mm256_loadu_ps(sums + o + kWidth);
#pragma GCC unroll 8
        for (int r = 0; r < count; ++r) {
            const __m256 value = _mm256_broadcast_ss(rows.value + done + r);
            _mm_prefetch(reinterpret_cast<const char*>(next[r] + o * Values::bytes), _MM_HINT_T1);
            lower = _mm256_fmadd_ps(value, Values::load(row[r] + o * Values::bytes), lower);
            upper = _mm256_fmadd_ps(value, Values::load(row[r] + (o + kWidth) * Values::bytes), upper);
        }
        _mm256_storeu_ps(sums + o, lower), _mm256_storeu_ps(sums + o + kWidth, upper);
    }
}

template <typename Values>
NIWAKI_AVX2 void add_rows(const KeptRows& rows, int64_t outputs, float* sums) {
    int64_t done = 0;
    for (; done + kPass <= rows.count; done += kPass) add_some<Values, kPass>(rows, done, outputs, sums);
    if (done + 4 <= rows.count) add_some<Values, 4>(rows, done, outputs, sums), done += 4;
    for (; done < rows.count; ++done) add_some<Values, 1>(rows, done, outputs, sums);
    add_rest(rows, Values::kind, outputs / (2 * kWidth) * (2 * kWidth), outputs, sums);
}

// Adds `count` pairs of rows. Words of two rows side by side hold the codes of four outputs.
template <int count>
NIWAKI_AVX2 inline void add_some_pairs(const KeptPairs& p, int64_t done, int64_t blocks, int32_t* sums) {
    const __m256i lower = _mm256_set1_epi16(0x0f), upper = _mm256_set1_epi16(0xf0);
    const uint8_t *row[2 * count], *next[2 * count];
    for (int r = 0; r < 2 * count; ++r) {
        const bool more = done + count + r / 2 < p.listed;
        row[r] = p.codes + p.input[2 * done + r] * p.row_bytes;
        next[r] = more ? p.codes + p.input[2 * (done + count) + r] * p.row_bytes : row[r];
    }
    for (int64_t half = 0; half < 2 * blocks; ++half) {
        const int64_t at = half * kCodeBytes / 2;
        int32_t* own = sums + half / 2 * kCodeOutputs + half % 2 * kWidth;
        __m256i sum[8];
        for (int i = 0; i < 8; ++i) sum[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(own + 16 * i));
#pragma GCC unroll 4
        for (int k = 0; k < count; ++k) {
            const __m256i value = _mm256_set1_epi32(p.value[done + k]);
            const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row[2 * k] + at));
            const __m256i two = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row[2 * k + 1] + at));
            _mm_prefetch(reinterpret_cast<const char*>(next[2 * k] + at), _MM_HINT_T1);
            _mm_prefetch(reinterpret_cast<const char*>(next[2 * k + 1] + at), _MM_HINT_T1);
            const __m256i words[2] = {_mm256_unpacklo_epi16(one, two), _mm256_unpackhi_epi16(one, two)};
            for (int h = 0; h < 2; ++h) {
                const __m256i rest = _mm256_srli_epi16(words[h], 8);
                const __m256i codes[4] = {_mm256_and_si256(words[h], lower), _mm256_and_si256(words[h], upper),
                                          _mm256_and_si256(rest, lower), _mm256_and_si256(rest, upper)};
                for (int i = 0; i < 4; ++i)
                    sum[4 * h + i] = _mm256_add_epi32(sum[4 * h + i], _mm256_madd_epi16(codes[i], value));
            }
        }
        for (int i = 0; i < 8; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(own + 16 * i), sum[i]);
    }
}

NIWAKI_AVX2 void add_pairs(const KeptPairs& p, int64_t blocks, int32_t* sums) {
    int64_t done = 0;
    for (; done + 4 <= p.count; done += 4) add_some_pairs<4>(p, done, blocks, sums);
    for (; done < p.count; ++done) add_some_pairs<1>(p, done, blocks, sums);
}

NIWAKI_AVX2 void finish(const RunLevels& levels, int64_t blocks, int32_t* sums, float* out) {
    const __m256 total = _mm256_set1_ps(levels.total), shift = _mm256_set1_ps(levels.shift);
    const __m256 factor[2] = {_mm256_set1_ps(levels.factor), _mm256_set1_ps(levels.factor / 16)};
    for (int64_t o = 0; o < blocks * kCodeOutputs; o += kWidth) {
        auto* own = reinterpret_cast<__m256i*>(sums + o);
        const __m256 sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_loadu_si256(own)), factor[o >> 4 & 1], shift);
        const __m256 scale = Fp16::load(reinterpret_cast<const uint8_t*>(levels.scale + o));
        __m256 result = _mm256_loadu_ps(out + o);
        if (levels.offset) {
            const __m256 offset = Fp16::load(reinterpret_cast<const uint8_t*>(levels.offset + o));
            result = _mm256_fmadd_ps(scale, sum, _mm256_fmadd_ps(offset, total, result));
        } else {
            const __m256 zero = levels.zero ? _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(
                                                  reinterpret_cast<const __m128i*>(levels.zero + o))))
                                            : _mm256_set1_ps(levels.centre);
            result = _mm256_fmadd_ps(scale, _mm256_fnmadd_ps(zero, total, sum), result);
        }
        _mm256_storeu_ps(out + o, result);
        _mm256_storeu_si256(own, _mm256_setzero_si256());
    }
}

}  // namespace

const InputKernels kInputsAvx2 = {{add_rows<Bf16>, add_rows<Fp16>, add_rows<Fp32>}, add_pairs, finish};

}  // namespace niwaki

#endif
