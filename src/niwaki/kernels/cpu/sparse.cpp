// Products with matrices stored as their nonzeros (formats/sparse.py). A byte of places says where the values of eight
// columns belong, and a table turns it into one shuffle that spreads them over eight lanes. Sums are float32.
//
// A bitmap and the 2-bit indices of two-four differ only in the table, and in the step to the next values. Codes of 4 and
// 8 bits are spread to the top of a lane, where they are signed numbers: absent ones are zero without a mask.
//
// This file chooses the instruction set: sparse_bf16.cpp (bfloat16 weights and inputs), sparse_avx2.cpp, or
// sparse_portable.cpp.

#include "sparse.h"

namespace niwaki {
namespace {

SparseKernels choose(const SparseProduct& p, Path path) {
#ifdef NIWAKI_X86
    if (path != Path::portable && supported(Path::avx2)) return sparse_avx2(p.layout, p.kind);
#endif
    return kSparsePortable;
}

#ifdef NIWAKI_X86
bool takes_bf16(const SparseProduct& p, Path path) {
    return p.kind == SparseValues::bf16 && (path == Path::best || path == Path::bf16) && supported(Path::bf16);
}
#endif

}  // namespace

void sparse_product(const SparseProduct& p, int threads, Path path) {
    auto rows = choose(p, path).rows;
#ifdef NIWAKI_X86
    if (p.narrow && takes_bf16(p, path)) rows = sparse_bf16(p.layout).rows;
#endif
    over_rows(p.rows, threads, [&](int64_t first, int64_t last) { rows(p, first, last); });
}

void sparse_decode(const SparseProduct& p, const Decoded& to, int threads, Path path) {
#ifdef NIWAKI_X86
    if (to.bfloat16 && takes_bf16(p, path)) {
        const auto decode = sparse_bf16(p.layout).decode;
        return over_rows(to.last - to.first, threads, [&](int64_t begin, int64_t end) {
            auto* out = static_cast<uint16_t*>(to.out);
            for (int64_t row = begin; row < end; ++row)
                decode(p, to.first + row, out + row * to.columns, to.columns);
        });
    }
#endif
    const auto decode = choose(p, path).decode;
    over_rows(to.last - to.first, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> own(p.bytes * 8);
        for (int64_t row = begin; row < end; ++row) {
            decode(p, to.first + row, own.data());
            put_row(to, row, own.data());
        }
    });
}

}  // namespace niwaki
