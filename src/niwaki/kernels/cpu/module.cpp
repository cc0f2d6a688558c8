// Python's view of the CPU kernels: tensors come in through DLPack, nothing is linked to PyTorch.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "kernels.h"

namespace nb = nanobind;
using Floats = nb::ndarray<float, nb::device::cpu, nb::c_contig>;
using Bytes = nb::ndarray<uint8_t, nb::device::cpu, nb::c_contig>;
using Ints = nb::ndarray<int32_t, nb::device::cpu, nb::c_contig>;

NB_MODULE(_cpu, module) {
    module.doc() = "Compiled CPU kernels; niwaki.kernels checks shapes and chooses between them and torch.";
    module.def("sweep_codes", [](Floats wanted, Floats base, bool has_base, Floats feed, Floats scale, Floats offset,
                                 Ints group, Floats top, Bytes code, Floats change, int threads) {
        const niwaki::SweepCodes sweep{
            static_cast<int64_t>(wanted.shape(0)), static_cast<int64_t>(wanted.shape(1)),
            static_cast<int64_t>(scale.shape(1)), wanted.data(), base.data(), has_base, feed.data(), scale.data(),
            offset.data(), group.data(), top.data(), code.data(), change.data(),
        };
        nb::gil_scoped_release unlocked;
        niwaki::sweep_codes(sweep, threads);
    });
}
