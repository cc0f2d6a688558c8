// Every path of the products with nonzeros against a plain loop, and its time: a program of its own, for processors that
// the tests do not run on. Needs a compiler and nothing else:
//
//   g++ -O3 -std=c++17 -ffp-contract=fast -fno-math-errno -Isrc/niwaki/kernels/cpu benchmarks/sparse_paths.cpp
//       src/niwaki/kernels/cpu/[!m]*.cpp
//       -lpthread -ldl -o sparse_paths && ./sparse_paths
//
// Prints the largest error of every supported path over odd shapes, layouts, tokens and threads, then microseconds of
// one product of 4096 × 4096 at half zeros, best of 20. Ends with 1 if a path is wrong.

#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

#include "kernels.h"

using namespace niwaki;

namespace {

const Path kPaths[] = {Path::portable, Path::avx2, Path::bf16};
const char* kNames[] = {"portable", "avx2", "bf16"};
constexpr int kSlack = 64;

float widened(uint16_t narrow) {
    const uint32_t bits = static_cast<uint32_t>(narrow) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

struct Problem {
    int64_t rows, bytes;
    SparseLayout layout;
    std::vector<uint8_t> places, values;
    std::vector<int32_t> starts;
    std::vector<float> dense;  // [rows, 8 · bytes]
};

Problem make(int64_t rows, int64_t bytes, SparseLayout layout, std::mt19937& random) {
    Problem made{rows, bytes, layout, std::vector<uint8_t>(rows * bytes), {}, {}, std::vector<float>(rows * bytes * 8)};
    std::vector<uint16_t> values;
    std::normal_distribution<float> normal;
    for (int64_t row = 0; row < rows; ++row) {
        made.starts.push_back(static_cast<int32_t>(values.size()));
        for (int64_t b = 0; b < bytes; ++b) {
            uint8_t byte = row % 5 == 1 ? 0 : row % 5 == 2 ? 255 : static_cast<uint8_t>(random());  // empty, full rows
            int columns[8], count = 0;
            if (layout == SparseLayout::bitmap) {
                for (int i = 0; i < 8; ++i)
                    if (byte >> i & 1) columns[count++] = i;
            } else {
                byte = 0;
                for (int four = 0; four < 2; ++four) {
                    const int low = static_cast<int>(random() % 3), high = low + 1 + static_cast<int>(random() % (3 - low));
                    byte |= static_cast<uint8_t>((low | high << 2) << (4 * four));
                    columns[count++] = 4 * four + low, columns[count++] = 4 * four + high;
                }
            }
            made.places[row * bytes + b] = byte;
            for (int i = 0; i < count; ++i) {
                const float value = normal(random);
                uint32_t bits;
                std::memcpy(&bits, &value, 4);
                values.push_back(static_cast<uint16_t>(bits >> 16));
                made.dense[(row * bytes + b) * 8 + columns[i]] = widened(values.back());
            }
        }
    }
    made.values.assign(2 * values.size() + kSlack, 255);  // what lies behind the last value is poison
    std::memcpy(made.values.data(), values.data(), 2 * values.size());
    return made;
}

// `x` holds bfloat16 numbers.
struct Inputs {
    std::vector<float> wide;
    std::vector<uint16_t> narrow;
    int64_t narrow_columns;
};

Inputs inputs(int64_t tokens, int64_t bytes, std::mt19937& random) {
    std::normal_distribution<float> normal;
    Inputs made{{}, {}, (bytes + 3) / 4 * 32};
    made.narrow.resize(tokens * made.narrow_columns);
    for (int64_t n = 0; n < tokens; ++n)
        for (int64_t i = 0; i < 8 * bytes; ++i) {
            const float value = normal(random);
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            made.narrow[n * made.narrow_columns + i] = static_cast<uint16_t>(bits >> 16);
            made.wide.push_back(widened(static_cast<uint16_t>(bits >> 16)));
        }
    return made;
}

void multiply(const Problem& from, int64_t tokens, const Inputs& x, float* out, int threads, Path path) {
    const SparseProduct product{
        tokens, from.rows, from.bytes, from.layout, SparseValues::bf16, from.places.data(), from.values.data(),
        from.layout == SparseLayout::bitmap ? from.starts.data() : nullptr, nullptr, 1, from.bytes, x.wide.data(), out,
        x.narrow.data(), x.narrow_columns};
    sparse_product(product, threads, path);
}

double worst_error(Path path, std::mt19937& random) {
    double worst = 0;
    for (const SparseLayout layout : {SparseLayout::bitmap, SparseLayout::two_four})
        for (const int64_t bytes : {1, 2, 3, 4, 5, 7, 31, 64, 129})
            for (const int64_t tokens : {1, 2, 3, 5, 8, 13})
                for (const int threads : {1, 2}) {
                    const int64_t rows = 1 + static_cast<int64_t>(random() % 40), width = 8 * bytes;
                    const Problem problem = make(rows, bytes, layout, random);
                    const Inputs x = inputs(tokens, bytes, random);
                    std::vector<float> out(tokens * rows, std::numeric_limits<float>::quiet_NaN());
                    multiply(problem, tokens, x, out.data(), threads, path);
                    for (int64_t n = 0; n < tokens; ++n)
                        for (int64_t row = 0; row < rows; ++row) {
                            double sum = 0, size = 1e-6;
                            for (int64_t i = 0; i < width; ++i) {
                                const double term = static_cast<double>(problem.dense[row * width + i]) * x.wide[n * width + i];
                                sum += term, size += std::fabs(term);
                            }
                            const double error = std::fabs(out[n * rows + row] - sum) / size;
                            if (!(error <= worst)) worst = error == error ? error : 1e9;
                        }
                }
    return worst;
}

double microseconds(const Problem& problem, int64_t tokens, Path path, std::mt19937& random) {
    const Inputs x = inputs(tokens, problem.bytes, random);
    std::vector<float> out(tokens * problem.rows);
    double best = 1e9;
    for (int round = 0; round < 20; ++round) {
        const auto start = std::chrono::steady_clock::now();
        multiply(problem, tokens, x, out.data(), 1, path);
        best = std::min(best, std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
}

}  // namespace

int main() {
    std::mt19937 random(1);
    bool right = true;
    for (int i = 0; i < 3; ++i) {
        if (!supported(kPaths[i])) {
            std::printf("%-8s not on this processor\n", kNames[i]);
            continue;
        }
        const double error = worst_error(kPaths[i], random);
        right = right && error < 1e-5;
        std::printf("%-8s largest error %.2e %s\n", kNames[i], error, error < 1e-5 ? "ok" : "WRONG");
    }
    for (const SparseLayout layout : {SparseLayout::bitmap, SparseLayout::two_four}) {
        const Problem problem = make(4096, 512, layout, random);
        for (const int64_t tokens : {1, 4, 8})
            for (int i = 1; i < 3; ++i)
                if (supported(kPaths[i]))
                    std::printf("%-8s %s, %d tokens: %.0f microseconds\n", kNames[i],
                                layout == SparseLayout::bitmap ? "bitmap" : "two_four", static_cast<int>(tokens),
                                microseconds(problem, tokens, kPaths[i], random));
    }
    return right ? 0 : 1;
}
