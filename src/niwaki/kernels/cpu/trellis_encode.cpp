// Search of the cheapest path of a trellis for every ring of 32 rows, with the contract of kernels/trellis.py: encode.
// A ring is short and its 256 states fit in a cache, so that one thread takes one ring after another.

#include "kernels.h"
#include "x86.h"

#include <limits>

namespace niwaki {
namespace {

constexpr int kStates = 256, kRing = 32;

// Moves the costs of all states by one row: `choice` is the predecessor that every group of successors takes.
template <int K>
NIWAKI_MULTIVERSION void step(const float* before, float* after, uint8_t* choice, const float* level, float wanted,
                              float weight) {
    constexpr int kBranches = 1 << K, kGroups = kStates >> K;
    float best[kGroups];
    int32_t taken[kGroups];
    for (int g = 0; g < kGroups; ++g) best[g] = before[g], taken[g] = 0;
    for (int j = 1; j < kBranches; ++j)
        for (int g = 0; g < kGroups; ++g) {
            const float other = before[j * kGroups + g];
            taken[g] = other < best[g] ? j : taken[g];
            best[g] = other < best[g] ? other : best[g];
        }
    for (int g = 0; g < kGroups; ++g) choice[g] = static_cast<uint8_t>(taken[g]);
    for (int g = 0; g < kGroups; ++g)
        for (int b = 0; b < kBranches; ++b) after[g * kBranches + b] = best[g];
    for (int s = 0; s < kStates; ++s) {
        const float miss = wanted - level[s];
        after[s] += weight * miss * miss;
    }
}

#ifdef NIWAKI_X86
// The same for AVX-512: 16 groups at a time, whose costs go to the 2^K successors of each by a permutation.
template <int K>
NIWAKI_AVX512 void step_avx512(const float* before, float* after, uint8_t* choice, const float* level, float wanted,
                               float weight) {
    constexpr int kBranches = 1 << K, kGroups = kStates >> K;
    const __m512 value = _mm512_set1_ps(wanted), heavy = _mm512_set1_ps(weight);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int g = 0; g < kGroups; g += 16) {
        __m512 best = _mm512_loadu_ps(before + g);
        __m512i taken = _mm512_setzero_si512();
        for (int j = 1; j < kBranches; ++j) {
            const __m512 other = _mm512_loadu_ps(before + j * kGroups + g);
            const __mmask16 less = _mm512_cmp_ps_mask(other, best, _CMP_LT_OQ);
            best = _mm512_mask_mov_ps(best, less, other);
            taken = _mm512_mask_mov_epi32(taken, less, _mm512_set1_epi32(j));
        }
        _mm_storeu_si128(reinterpret_cast<__m128i*>(choice + g), _mm512_cvtepi32_epi8(taken));
        for (int q = 0; q < kBranches; ++q) {
            const int at = g * kBranches + q * 16;
            const __m512i from = _mm512_srli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(q * 16)), K);
            const __m512 miss = _mm512_sub_ps(value, _mm512_loadu_ps(level + at));
            const __m512 old = _mm512_permutexvar_ps(from, best);
            _mm512_storeu_ps(after + at, _mm512_fmadd_ps(_mm512_mul_ps(miss, heavy), miss, old));
        }
    }
}
#endif

template <int K>
void encode_ring(bool wide, const float* wanted, const float* weight, const float* level, uint8_t* state) {
    constexpr int kGroups = kStates >> K;
    float costs[2][kStates] = {};
    uint8_t choice[kRing][kGroups];
    float *now = costs[0], *next = costs[1];
    const auto walk = [&](int row) {
#ifdef NIWAKI_X86
        if (wide)
            step_avx512<K>(now, next, choice[row], level, wanted[row], weight[row]);
        else
#endif
            step<K>(now, next, choice[row], level, wanted[row], weight[row]);
        std::swap(now, next);
    };
    const auto before = [&](int row, int s) { return choice[row][s >> K] * kGroups + (s >> K); };
    // Rows 15 … 0, then 31 … 16: the path in the middle is the state that the ring begins and ends with.
    for (int i = 0; i < kRing; ++i) walk((kRing + kRing / 2 - 1 - i) % kRing);
    int s = static_cast<int>(std::min_element(now, now + kStates) - now);
    for (int row = kRing / 2; row < kRing; ++row) s = before(row, s);
    std::fill_n(now, kStates, std::numeric_limits<float>::infinity());
    now[s] = 0;
    for (int row = kRing - 1; row >= 0; --row) walk(row);
    for (int row = 0; row < kRing; ++row) state[row] = static_cast<uint8_t>(s), s = before(row, s);
}

}  // namespace

void trellis_encode(const TrellisEncode& e, int threads) {
    const int64_t tiles = (e.rows + kRing - 1) / kRing;
    const bool wide = supported(Path::avx512);
    over_rows(e.columns, threads, [&](int64_t first, int64_t last) {
        for (int64_t tile = 0; tile < tiles; ++tile)
            for (int64_t column = first; column < last; ++column) {
                float wanted[kRing] = {}, weight[kRing] = {};
                uint8_t state[kRing];
                const int64_t rows = std::min<int64_t>(kRing, e.rows - tile * kRing);
                for (int64_t row = 0; row < rows; ++row) {
                    const int64_t at = (tile * kRing + row) * e.columns + column;
                    wanted[row] = e.wanted[at], weight[row] = e.weight[tile * kRing + row];
                }
                if (e.bits == 1) encode_ring<1>(wide, wanted, weight, e.level, state);
                if (e.bits == 2) encode_ring<2>(wide, wanted, weight, e.level, state);
                if (e.bits == 3) encode_ring<3>(wide, wanted, weight, e.level, state);
                if (e.bits == 4) encode_ring<4>(wide, wanted, weight, e.level, state);
                for (int64_t row = 0; row < kRing; ++row)
                    e.state[(tile * kRing + row) * e.columns + column] = state[row];
            }
    });
}

}  // namespace niwaki
