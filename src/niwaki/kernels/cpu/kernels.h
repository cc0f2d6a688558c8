// What the CPU kernels share: their arguments as plain pointers, and rows divided over threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

// The same loop compiled for AVX-512, AVX2 and any processor, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define NIWAKI_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define NIWAKI_MULTIVERSION
#endif

namespace niwaki {

struct SweepCodes {
    int64_t rows, columns, groups;
    float* wanted;         // [rows, columns], overwritten
    const float* base;     // [rows, columns], read if has_base
    bool has_base;
    const float* feed;     // [columns, columns]
    const float* scale;    // [rows, groups]
    const float* offset;   // [rows, groups]
    const int32_t* group;  // [columns]
    const float* top;      // [columns]
    uint8_t* code;         // [rows, columns]
    float* change;         // [rows, columns]
};

void sweep_codes(const SweepCodes& sweep, int threads);

// Calls work(first, last) for a share of the rows on each of `threads` threads.
template <typename Work>
void over_rows(int64_t rows, int threads, Work work) {
    const int64_t share = (rows + threads - 1) / std::max(threads, 1);
    std::vector<std::thread> others;
    for (int64_t first = share; first < rows; first += share)
        others.emplace_back(work, first, std::min(rows, first + share));
    work(0, std::min(rows, share));
    for (std::thread& other : others) other.join();
}

}  // namespace niwaki
