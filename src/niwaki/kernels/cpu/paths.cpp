// The instruction sets that this processor supports.

#include "kernels.h"
#include "x86.h"

namespace niwaki {

bool supported(Path path) {
#ifdef NIWAKI_X86
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (path == Path::avx2) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    if (path == Path::avx512) return avx512;
    if (path == Path::bf16)
        return avx512 && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16");
    if (path == Path::gfni)
        return avx512 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2") &&
               __builtin_cpu_supports("gfni");
    if (path == Path::vbmi)
        return avx512 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
               __builtin_cpu_supports("avx512vnni");
#endif
    return path == Path::best || path == Path::portable;
}

}  // namespace niwaki
