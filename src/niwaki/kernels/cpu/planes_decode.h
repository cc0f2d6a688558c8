// Decoding of bit planes by GFNI, for planes_decode.cpp.

#pragma once

#include "kernels.h"
#include "x86.h"

namespace niwaki {

#ifdef NIWAKI_X86
// Returns whether the processor, the bits of the parts and the target allow `plane_decode_gfni`.
bool takes_gfni(const std::vector<PlaneProduct>& parts, const Decoded& to, Path path);
void plane_decode_gfni(const std::vector<PlaneProduct>& parts, const Decoded& to, int threads);
#endif

}  // namespace niwaki
