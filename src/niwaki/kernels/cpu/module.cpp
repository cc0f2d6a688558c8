// Python's view of the CPU kernels: tensors come in through DLPack, nothing is linked to PyTorch.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include "kernels.h"

namespace nb = nanobind;
using Floats = nb::ndarray<float, nb::device::cpu, nb::c_contig>;
using Bytes = nb::ndarray<uint8_t, nb::device::cpu, nb::c_contig>;
using Shorts = nb::ndarray<int16_t, nb::device::cpu, nb::c_contig>;
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
    module.def("plane_product", [](Bytes planes, Shorts scale, std::optional<Shorts> offset, std::optional<Bytes> zero,
                                   float centre, int64_t group_bytes, std::optional<Ints> column, int64_t columns,
                                   Floats x, Floats out, int threads, int path) {
        const niwaki::PlaneProduct product{
            static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(out.shape(1)), columns,
            static_cast<int64_t>(planes.shape(1)), static_cast<int64_t>(planes.shape(2)),
            static_cast<int64_t>(scale.shape(0)), group_bytes,
            planes.data(), reinterpret_cast<const uint16_t*>(scale.data()),
            offset ? reinterpret_cast<const uint16_t*>(offset->data()) : nullptr, zero ? zero->data() : nullptr,
            centre, column ? column->data() : nullptr, x.data(), static_cast<int64_t>(x.shape(1)), out.data(),
        };
        nb::gil_scoped_release unlocked;
        niwaki::plane_product(product, threads, static_cast<niwaki::Path>(path));
    }, nb::arg("planes"), nb::arg("scale"), nb::arg("offset").none(), nb::arg("zero").none(), nb::arg("centre"),
       nb::arg("group_bytes"), nb::arg("column").none(), nb::arg("columns"), nb::arg("x"), nb::arg("out"),
       nb::arg("threads"), nb::arg("path"));
    // By number: 0 the best there is, 1 portable, 2 AVX2, 3 AVX-512.
    module.def("supported", [](int path) { return niwaki::supported(static_cast<niwaki::Path>(path)); });
}
