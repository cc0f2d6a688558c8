// Products of a few tokens with a matrix stored by inputs, [inputs, outputs]. Only rows whose input is larger than a
// threshold are read. Eight rows at a time run through the outputs, so the sums are loaded and stored once for eight, and
// every row is one stream of neighbouring bytes. While they run, the lines of the next eight rows are fetched into
// the second cache. Fetched into the first one they wait for its few buffers, and a core reads a third less.
//
// Tokens keep inputs of their own. They take turns with some inputs at a time, whose rows then lie in the cache. Both halves
// of the inputs have sums of their own, so that two threads read whole rows, and more threads part the outputs. Each sum
// grows in the order of the inputs: a token is the same alone and among others, on one thread and on several.
//
// Codes multiply whole numbers: the inputs of a run get 16 bits and one scale. What rounding changes in their sum, the
// middle code makes good, so that only distances from it are rounded. Against float32 that costs about 2e-5 of the norm of
// the output. Scales and zeros of a group are applied once per run.

#include "inputs.h"

#include <cmath>

namespace niwaki {
namespace {

constexpr int64_t kHalves = 2;             // of the inputs
constexpr int64_t kPartOutputs = 128;      // threads part the outputs at whole lines of memory and blocks of codes
constexpr int64_t kTileOutputs = 4096;     // whose sums stay in the first cache
constexpr int64_t kSharedBytes = 1 << 18;  // of rows that tokens read in turns, from the second cache
constexpr float kLargest = 32767, kMiddle = 7.5;

InputKernels choose(Path path) {
#ifdef NIWAKI_X86
    if (path != Path::portable && path != Path::avx2 && supported(Path::avx512)) {
        InputKernels kernels = kInputsAvx512;
        if (path == Path::avx512 || !supported(Path::vbmi)) kernels.add_pairs = kInputsAvx2.add_pairs;
        return kernels;
    }
    if (path != Path::portable && supported(Path::avx2)) return kInputsAvx2;
#endif
    return kInputsPortable;
}

// Not a number is kept, so that it reaches the output.
bool keeps(float x, float threshold) { return !(std::fabs(x) <= threshold); }

// The kept inputs of one token, and how many lie before each chunk of inputs.
struct KeptInputs {
    std::vector<int32_t> input;
    std::vector<float> value;
    std::vector<int64_t> before;
    int64_t count = 0;
};

KeptInputs kept_inputs(const float* x, const std::vector<int64_t>& starts, float threshold) {
    KeptInputs kept{std::vector<int32_t>(starts.back() + 1), std::vector<float>(starts.back() + 1), {0}};
    for (size_t c = 0; c + 1 < starts.size(); ++c) {
        for (int64_t i = starts[c]; i < starts[c + 1]; ++i) {
            kept.input[kept.count] = static_cast<int32_t>(i), kept.value[kept.count] = x[i];
            kept.count += keeps(x[i], threshold);
        }
        kept.before.push_back(kept.count);
    }
    return kept;
}

// Calls work(half, first, last, sums of the first output) for both halves of the inputs and some tiles of the outputs, and
// writes sums and bias. Sums are [2, tokens, padded]: those of a token lie `padded` apart.
template <typename Work>
void over_halves(int64_t tokens, int64_t outputs, const float* bias, float* out, int threads, const Work& work) {
    const int64_t blocks = (outputs + kPartOutputs - 1) / kPartOutputs, padded = blocks * kPartOutputs;
    const int64_t parts = std::min(blocks, std::max<int64_t>(1, (threads + 1) / kHalves));
    std::vector<float> sums(kHalves * tokens * padded);
    over_rows(kHalves * parts, threads, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t half = unit / parts, part = unit % parts, stop = blocks * (part + 1) / parts * kPartOutputs;
            for (int64_t first = blocks * part / parts * kPartOutputs; first < stop; first += kTileOutputs)
                work(half, first, std::min(stop, first + kTileOutputs), padded,
                     &sums[half * tokens * padded + first]);
        }
    });
    for (int64_t n = 0; n < tokens; ++n) {
        const float *first = &sums[n * padded], *second = first + tokens * padded;
        for (int64_t o = 0; o < outputs; ++o) out[n * outputs + o] = first[o] + second[o] + (bias ? bias[o] : 0);
    }
}

// The kept inputs of one token as pairs of whole numbers, run by run. A last one alone stands beside itself with zero.
struct CodedInputs {
    std::vector<int32_t> input, value;
    std::vector<int64_t> before;  // pairs before every run
    std::vector<float> factor, shift, total;
};

void add_run(const float* x, int64_t first, int64_t last, float threshold, CodedInputs& made, int64_t& count) {
    made.before.push_back(static_cast<int64_t>(made.value.size()));
    int32_t own[kRunInputs + 1];
    int64_t kept = 0;
    for (int64_t i = first; i < last; ++i) own[kept] = static_cast<int32_t>(i), kept += keeps(x[i], threshold);
    count += kept;
    float largest = 0;
    bool finite = true;
    for (int64_t k = 0; k < kept; ++k) {
        largest = std::max(largest, std::fabs(x[own[k]]));
        finite &= std::isfinite(x[own[k]]);
    }
    const float inverse = finite && largest > 0 ? kLargest / largest : 0;
    int64_t rounded = 0;
    double total = 0;
    for (int64_t k = 0; k < kept; k += 2) {
        const bool both = k + 1 < kept;
        const int32_t other = own[both ? k + 1 : k];
        const auto low = static_cast<int32_t>(std::lrint(finite ? x[own[k]] * inverse : 0.0f));
        const auto high = static_cast<int32_t>(std::lrint(finite && both ? x[other] * inverse : 0.0f));
        rounded += low + high, total += x[own[k]] + (both ? x[other] : 0);
        made.input.push_back(own[k]), made.input.push_back(other);
        made.value.push_back(static_cast<int32_t>((low & 0xffff) | static_cast<uint32_t>(high) << 16));
    }
    const float factor = finite ? largest / kLargest : NAN;
    made.factor.push_back(factor), made.total.push_back(static_cast<float>(total));
    made.shift.push_back(kMiddle * static_cast<float>(total - static_cast<double>(rounded) * factor));
}

}  // namespace

int64_t inputs_product(const InputsProduct& p, int threads, Path path) {
    const AddRows add = choose(path).add[static_cast<int>(p.kind)];
    const int64_t bytes = p.kind == SparseValues::fp32 ? 4 : 2, middle = (p.inputs + 1) / kHalves;
    const int64_t shared = std::max(2 * kPass, kSharedBytes / (std::min(kTileOutputs, p.outputs) * bytes));
    const int64_t chunk = p.tokens == 1 ? middle : std::min(middle, shared);
    std::vector<int64_t> starts;
    for (int64_t first = 0; first < middle; first += chunk) starts.push_back(first);
    const auto second = static_cast<int64_t>(starts.size());  // chunk of the second half
    for (int64_t first = middle; first < p.inputs; first += chunk) starts.push_back(first);
    starts.push_back(p.inputs);
    std::vector<KeptInputs> kept;
    int64_t count = 0;
    for (int64_t n = 0; n < p.tokens; ++n) {
        kept.push_back(kept_inputs(p.x + n * p.inputs, starts, p.threshold));
        count += kept.back().count;
    }
    const auto work = [&](int64_t half, int64_t first, int64_t last, int64_t padded, float* sums) {
        const int64_t end = half ? static_cast<int64_t>(starts.size()) - 1 : second;
        for (int64_t c = half ? second : 0; c < end; ++c)
            for (int64_t n = 0; n < p.tokens; ++n) {
                const int64_t from = kept[n].before[c];
                add({p.weight + first * bytes, p.stride * bytes, &kept[n].input[from], &kept[n].value[from],
                     kept[n].before[c + 1] - from, kept[n].before[end] - from},
                    std::min(last, p.outputs) - first, sums + n * padded);
            }
    };
    over_halves(p.tokens, p.outputs, p.bias, p.out, threads, work);
    return count;
}

int64_t input_codes_product(const InputCodesProduct& p, int threads, Path path) {
    const InputKernels kernels = choose(path);
    std::vector<CodedInputs> coded(p.tokens);
    for (CodedInputs& own : coded) own.input.reserve(2 * p.inputs), own.value.reserve(p.inputs);
    std::vector<int64_t> groups;  // of every run
    int64_t count = 0;
    for (int64_t first = 0; first < p.inputs; first += p.group)
        for (int64_t run = first; run < std::min(p.inputs, first + p.group); run += kRunInputs) {
            groups.push_back(first / p.group);
            const int64_t last = std::min({p.inputs, first + p.group, run + kRunInputs});
            for (int64_t n = 0; n < p.tokens; ++n) add_run(p.x + n * p.inputs, run, last, p.threshold, coded[n], count);
        }
    for (CodedInputs& own : coded) own.before.push_back(static_cast<int64_t>(own.value.size()));
    const auto runs = static_cast<int64_t>(groups.size());
    const auto work = [&](int64_t half, int64_t first, int64_t last, int64_t padded, float* out) {
        const int64_t blocks = (last - first) / kCodeOutputs, end = half ? runs : runs / kHalves;
        std::vector<int32_t> sums(last - first);
        for (int64_t run = half ? runs / kHalves : 0; run < end; ++run)
            for (int64_t n = 0; n < p.tokens; ++n) {
                const CodedInputs& token = coded[n];
                const int64_t from = token.before[run], pairs = token.before[run + 1] - from;
                if (pairs == 0) continue;
                kernels.add_pairs({p.codes + first / kCodeOutputs * kCodeBytes, p.bytes, &token.input[2 * from],
                                   &token.value[from], pairs, token.before[end] - from},
                                  blocks, sums.data());
                const int64_t at = groups[run] * 2 * p.bytes + first;
                kernels.finish({p.scale + at, p.offset ? p.offset + at : nullptr, p.zero ? p.zero + at : nullptr,
                                p.centre, token.factor[run], token.shift[run], token.total[run]},
                               blocks, sums.data(), out + n * padded);
            }
    };
    over_halves(p.tokens, p.outputs, p.bias, p.out, threads, work);
    return count;
}

}  // namespace niwaki
