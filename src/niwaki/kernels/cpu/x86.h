// Intrinsics of x86-64, where the compiler has them, and the instruction sets of functions as attributes. Every file of an
// instruction set compiles on any processor; `supported` chooses at run time.

#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define NIWAKI_X86 1
#include <immintrin.h>
#define NIWAKI_AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
#define NIWAKI_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw")))
#define NIWAKI_BF16 __attribute__((target("avx512f,avx512bw,avx512vbmi2,avx512bf16,popcnt")))
#define NIWAKI_GFNI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vbmi2,gfni")))
#define NIWAKI_VBMI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")))
#endif
