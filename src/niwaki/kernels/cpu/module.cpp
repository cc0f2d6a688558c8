// Python bindings of the CPU kernels. Tensors come in through DLPack, and nothing is linked to PyTorch.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <cstring>

#include "checks.h"
#include "kernels.h"

namespace nb = nanobind;
using Floats = nb::ndarray<float, nb::device::cpu, nb::c_contig>;
using Bytes = nb::ndarray<uint8_t, nb::device::cpu, nb::c_contig>;
using Shorts = nb::ndarray<int16_t, nb::device::cpu, nb::c_contig>;
using Ints = nb::ndarray<int32_t, nb::device::cpu, nb::c_contig>;

namespace {

float widened(uint16_t narrow) {
    const uint32_t bits = static_cast<uint32_t>(narrow) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

using niwaki::narrowed;
using niwaki::require, niwaki::require_groups, niwaki::require_shape, niwaki::require_side;

constexpr int64_t kTile = 32;    // rows of a tile
constexpr int64_t kMaxBits = 8;  // a code is a byte
constexpr int64_t kTables = 4;   // bytes of columns that share a table scale: groups hold whole ones

// Requires that the columns of a part have positions in range, none of which `seen` marks, and marks them.
void require_positions(const std::optional<Ints>& column, int64_t columns, int64_t inputs,
                       std::vector<uint8_t>& seen) {
    if (column) {
        require_shape(*column, {columns}, "the positions do not fit the columns");
        seen.resize(inputs);
        for (int64_t i = 0; i < columns; ++i) {
            const int64_t at = column->data()[i];
            require(at >= 0 && at < inputs && !seen[at], "a position is out of range or occurs again");
            seen[at] = 1;
        }
    }
    require(column || columns == inputs, "a part without positions needs all columns");
}

// Checks one part of a packed matrix, and returns it without inputs and outputs. `seen` marks the positions so far.
niwaki::PlaneProduct checked_part(int64_t rows, int64_t inputs, const Bytes& planes, const Shorts& scale,
                                  const std::optional<Shorts>& offset, const std::optional<Bytes>& zero, float centre,
                                  int64_t group_bytes, const std::optional<Ints>& column, int64_t columns,
                                  std::vector<uint8_t>& seen) {
    require_side(rows, "rows are out of range"), require_side(inputs, "inputs are out of range");
    require(columns >= 1 && columns <= inputs, "a part has more columns than the matrix");
    require(planes.ndim() == 4 && scale.ndim() == 2, "planes need four axes, and scales two");
    const auto bits = static_cast<int64_t>(planes.shape(1)), groups = static_cast<int64_t>(scale.shape(0));
    const int64_t bytes = niwaki::ceil_div(columns, 8);
    require(bits >= 1 && bits <= kMaxBits, "codes need 1 to 8 bits");
    require_shape(planes, {niwaki::ceil_div(rows, kTile), bits, bytes, kTile}, "planes do not fit rows and columns");
    require_groups(groups, group_bytes, bytes, "groups do not fit the columns");
    require_shape(scale, {groups, rows}, "scales do not fit groups and rows");
    if (offset) require_shape(*offset, {groups, rows}, "offsets do not fit groups and rows");
    if (zero) require_shape(*zero, {groups, rows}, "zero codes do not fit groups and rows");
    require_positions(column, columns, inputs, seen);
    return {0, rows, columns, bits, bytes, groups, group_bytes, planes.data(),
            reinterpret_cast<const uint16_t*>(scale.data()),
            offset ? reinterpret_cast<const uint16_t*>(offset->data()) : nullptr, zero ? zero->data() : nullptr,
            centre, column ? column->data() : nullptr, nullptr, inputs, nullptr};
}

bool fits_tables(const niwaki::PlaneProduct& part) { return part.groups == 1 || part.group_bytes % kTables == 0; }

void require_rows(int64_t first, int64_t last, int64_t rows) {
    require(first >= 0 && first <= last && last <= rows, "the rows are out of range");
}

// The parts of a packed matrix, which the layer keeps alive. Inputs come as addresses, so a call costs a microsecond.
class Layer {
public:
    Layer(int64_t rows, int64_t inputs) : rows_(rows), inputs_(inputs) {
        require_side(rows, "rows are out of range"), require_side(inputs, "inputs are out of range");
    }

    void add(Bytes planes, Shorts scale, std::optional<Shorts> offset, std::optional<Bytes> zero, float centre,
             int64_t group_bytes, std::optional<Ints> column, int64_t columns) {
        parts_.push_back(
            checked_part(rows_, inputs_, planes, scale, offset, zero, centre, group_bytes, column, columns, seen_));
        tables_ = tables_ && fits_tables(parts_.back());
        covered_ += columns;
        bytes_.push_back(planes), shorts_.push_back(scale);
        if (offset) shorts_.push_back(*offset);
        if (zero) bytes_.push_back(*zero);
        if (column) ints_.push_back(*column);
    }

    // Writes x Wᵀ to `out`. Both are contiguous float32 or bfloat16: [tokens, inputs] and [tokens, rows].
    void multiply(uintptr_t x, uintptr_t out, int64_t tokens, bool bfloat16, int threads) const {
        require(tokens >= 0 && tables_ && whole(), "the parts do not make a matrix, or groups are not whole tables");
        nb::gil_scoped_release unlocked;
        std::vector<niwaki::PlaneProduct> parts = parts_;
        std::vector<float> wide(bfloat16 ? tokens * inputs_ : 0), sums(bfloat16 ? tokens * rows_ : 0);
        const auto* given = reinterpret_cast<const uint16_t*>(x);
        for (size_t i = 0; i < wide.size(); ++i) wide[i] = widened(given[i]);
        float* to = bfloat16 ? sums.data() : reinterpret_cast<float*>(out);
        if (!bfloat16) std::fill_n(to, tokens * rows_, 0.0f);
        for (niwaki::PlaneProduct& part : parts)
            part.tokens = tokens, part.x = bfloat16 ? wide.data() : reinterpret_cast<const float*>(x), part.out = to;
        niwaki::plane_products(parts, threads, niwaki::Path::best);
        auto* narrow = reinterpret_cast<uint16_t*>(out);
        for (size_t i = 0; i < sums.size(); ++i) narrow[i] = narrowed(sums[i]);
    }

    // Writes rows [first, last) of the matrix, float32 or bfloat16, to the address `out`.
    void decode(uintptr_t out, int64_t first, int64_t last, bool bfloat16, int threads, int path) const {
        require(whole(), "the parts do not make a matrix");
        require_rows(first, last, rows_);
        nb::gil_scoped_release unlocked;
        const niwaki::Decoded to{first, last, inputs_, bfloat16, reinterpret_cast<void*>(out)};
        niwaki::plane_decode(parts_, to, threads, static_cast<niwaki::Path>(path));
    }

private:
    // Whether every input belongs to one part, for no position occurs twice: a target is written once and completely.
    bool whole() const { return covered_ == inputs_; }

    int64_t rows_, inputs_, covered_ = 0;
    bool tables_ = true;
    std::vector<uint8_t> seen_;  // of positions; empty without them
    std::vector<niwaki::PlaneProduct> parts_;
    std::vector<Bytes> bytes_;
    std::vector<Shorts> shorts_;
    std::vector<Ints> ints_;
};

// The parts of a matrix that a trellis codes, which the layer keeps alive. Inputs come as addresses.
class TrellisLayer {
public:
    TrellisLayer(int64_t rows, int64_t inputs) : rows_(rows), inputs_(inputs) {
        require_side(rows, "rows are out of range"), require_side(inputs, "inputs are out of range");
    }

    void add(Bytes rings, Bytes levels, Shorts scale, std::optional<Ints> column) {
        require(rings.ndim() == 3, "rings need three axes");
        const auto columns = static_cast<int64_t>(rings.shape(1)), bits = static_cast<int64_t>(rings.shape(2)) / 4;
        require(columns >= 1 && columns <= inputs_, "a part has more columns than the matrix");
        require(bits >= 1 && bits <= 4, "a trellis has 1 to 4 bits");
        require_shape(rings, {niwaki::ceil_div(rows_, kTile), columns, 4 * bits}, "rings do not fit rows and columns");
        require_shape(levels, {256}, "a trellis has 256 levels");
        require_shape(scale, {1, rows_}, "scales do not fit the rows");
        require_positions(column, columns, inputs_, seen_);
        parts_.push_back({0, rows_, columns, bits, rings.data(), reinterpret_cast<const int8_t*>(levels.data()),
                          reinterpret_cast<const uint16_t*>(scale.data()), column ? column->data() : nullptr, nullptr,
                          inputs_, nullptr});
        covered_ += columns;
        bytes_.push_back(rings), bytes_.push_back(levels), shorts_.push_back(scale);
        if (column) ints_.push_back(*column);
    }

    // Same contract as Layer::multiply.
    void multiply(uintptr_t x, uintptr_t out, int64_t tokens, bool bfloat16, int threads, int path) const {
        require(tokens >= 0 && covered_ == inputs_, "the parts do not make a matrix");
        nb::gil_scoped_release unlocked;
        std::vector<niwaki::TrellisProduct> parts = parts_;
        std::vector<float> wide(bfloat16 ? tokens * inputs_ : 0), sums(bfloat16 ? tokens * rows_ : 0);
        for (size_t i = 0; i < wide.size(); ++i) wide[i] = widened(reinterpret_cast<const uint16_t*>(x)[i]);
        float* to = bfloat16 ? sums.data() : reinterpret_cast<float*>(out);
        if (!bfloat16) std::fill_n(to, tokens * rows_, 0.0f);
        for (niwaki::TrellisProduct& part : parts)
            part.tokens = tokens, part.x = bfloat16 ? wide.data() : reinterpret_cast<const float*>(x), part.out = to;
        niwaki::trellis_products(parts, threads, static_cast<niwaki::Path>(path));
        for (size_t i = 0; i < sums.size(); ++i) reinterpret_cast<uint16_t*>(out)[i] = narrowed(sums[i]);
    }

    // Same contract as Layer::decode.
    void decode(uintptr_t out, int64_t first, int64_t last, bool bfloat16, int threads, int path) const {
        require(covered_ == inputs_, "the parts do not make a matrix");
        require_rows(first, last, rows_);
        require(first % kTile == 0, "the first row begins a tile");
        nb::gil_scoped_release unlocked;
        const niwaki::Decoded to{first, last, inputs_, bfloat16, reinterpret_cast<void*>(out)};
        niwaki::trellis_decode(parts_, to, threads, static_cast<niwaki::Path>(path));
    }

private:
    int64_t rows_, inputs_, covered_ = 0;
    std::vector<uint8_t> seen_;  // of positions; empty without them
    std::vector<niwaki::TrellisProduct> parts_;
    std::vector<Bytes> bytes_;
    std::vector<Shorts> shorts_;
    std::vector<Ints> ints_;
};

// A matrix of nonzeros, which the layer keeps alive. Inputs come as addresses.
class SparseLayer {
public:
    SparseLayer(int64_t columns, int layout, int kind, Bytes places, Bytes values, std::optional<Ints> starts,
                std::optional<Shorts> scale, int64_t group_bytes)
        : columns_(columns), places_(places), values_(values), starts_(starts), scale_(scale) {
        require_side(columns, "columns are out of range");
        require(layout >= 0 && layout <= 1 && kind >= 0 && kind <= 4, "layout or kind of values is unknown");
        require(places.ndim() == 2 && values.ndim() == 1, "places need two axes, and values one");
        const auto rows = static_cast<int64_t>(places.shape(0));
        const int64_t bytes = niwaki::ceil_div(columns, 8);
        require(rows >= 0 && rows <= niwaki::kMaxSide, "rows are out of range");
        require_shape(places, {rows, bytes}, "places do not fit the columns");
        const bool bitmap = static_cast<niwaki::SparseLayout>(layout) == niwaki::SparseLayout::bitmap;
        require(starts.has_value() == bitmap, "a bitmap needs starts, and two-four has none");
        if (starts) require_shape(*starts, {rows}, "starts do not fit the rows");
        require(scale.has_value() == (kind >= 3), "codes need scales, and other values have none");
        if (scale) {
            require(scale->ndim() == 2, "scales need two axes");
            const auto groups = static_cast<int64_t>(scale->shape(1));
            require_shape(*scale, {rows, groups}, "scales do not fit the rows");
            require_groups(groups, group_bytes, bytes, "groups do not fit the columns");
        }
        product_ = {
            0, static_cast<int64_t>(places.shape(0)), static_cast<int64_t>(places.shape(1)),
            static_cast<niwaki::SparseLayout>(layout), static_cast<niwaki::SparseValues>(kind), places.data(),
            values.data(), starts ? starts->data() : nullptr,
            scale ? reinterpret_cast<const uint16_t*>(scale->data()) : nullptr,
            scale ? static_cast<int64_t>(scale->shape(1)) : 1, scale ? group_bytes : product_bytes(places), nullptr,
            nullptr, nullptr, (static_cast<int64_t>(places.shape(1)) + 3) / 4 * 32,
        };
        niwaki::require_values(product_, static_cast<int64_t>(values.shape(0)));
    }

    // Writes x Wᵀ to `out`. Both are contiguous float32 or bfloat16: [tokens, columns] and [tokens, rows].
    void multiply(uintptr_t x, uintptr_t out, int64_t tokens, bool bfloat16, int threads, int path) const {
        require(tokens >= 0, "tokens are out of range");
        nb::gil_scoped_release unlocked;
        niwaki::SparseProduct product = product_;
        const int64_t width = product.bytes * 8;
        std::vector<float> wide(tokens * width), sums(bfloat16 ? tokens * product.rows : 0);
        for (int64_t n = 0; n < tokens; ++n)
            if (bfloat16)
                for (int64_t i = 0; i < columns_; ++i)
                    wide[n * width + i] = widened(reinterpret_cast<const uint16_t*>(x)[n * columns_ + i]);
            else
                std::memcpy(&wide[n * width], reinterpret_cast<const float*>(x) + n * columns_, 4 * columns_);
        std::vector<uint16_t> narrow(bfloat16 ? tokens * product.narrow_columns : 0);
        if (bfloat16)
            for (int64_t n = 0; n < tokens; ++n)
                std::memcpy(&narrow[n * product.narrow_columns], reinterpret_cast<const uint16_t*>(x) + n * columns_,
                            2 * columns_);
        product.tokens = tokens, product.x = wide.data(), product.narrow = bfloat16 ? narrow.data() : nullptr;
        product.out = bfloat16 ? sums.data() : reinterpret_cast<float*>(out);
        niwaki::sparse_product(product, threads, static_cast<niwaki::Path>(path));
        for (size_t i = 0; i < sums.size(); ++i) reinterpret_cast<uint16_t*>(out)[i] = narrowed(sums[i]);
    }

    // Writes rows [first, last) of the matrix, float32 or bfloat16, to the address `out`.
    void decode(uintptr_t out, int64_t first, int64_t last, bool bfloat16, int threads, int path) const {
        require_rows(first, last, product_.rows);
        nb::gil_scoped_release unlocked;
        const niwaki::Decoded to{first, last, columns_, bfloat16, reinterpret_cast<void*>(out)};
        niwaki::sparse_decode(product_, to, threads, static_cast<niwaki::Path>(path));
    }

private:
    static int64_t product_bytes(const Bytes& places) { return std::max<int64_t>(places.shape(1), 1); }

    int64_t columns_;
    Bytes places_, values_;
    std::optional<Ints> starts_;
    std::optional<Shorts> scale_;
    niwaki::SparseProduct product_;
};

// A two-four matrix of 4-bit codes in tiles, which the layer keeps alive. Inputs come as addresses.
class TileLayer {
public:
    TileLayer(int64_t rows, int64_t columns, int64_t group, Bytes places, Bytes codes, Shorts scale)
        : places_(places), codes_(codes), scale_(scale) {
        require_side(rows, "rows are out of range"), require_side(columns, "columns are out of range");
        require(columns % kTile == 0, "tiles need whole blocks of columns");
        require(group >= 1 && (group >= columns || group % kTile == 0), "groups are not whole blocks of columns");
        group = std::min(group, columns);
        const int64_t tiles = niwaki::ceil_div(rows, kTile);
        require_shape(places, {tiles, columns / 8, kTile}, "places do not fit rows and columns");
        require_shape(codes, {tiles, columns / 4, kTile}, "codes do not fit rows and columns");
        require_shape(scale, {niwaki::ceil_div(columns, group), tiles * kTile}, "scales do not fit groups and rows");
        product_ = {0, rows, static_cast<int64_t>(scale.shape(1)), columns, group, places.data(), codes.data(),
                    reinterpret_cast<const uint16_t*>(scale.data()), nullptr, nullptr};
    }

    // Same contract as SparseLayer::multiply.
    void multiply(uintptr_t x, uintptr_t out, int64_t tokens, bool bfloat16, int threads, int path) const {
        require(tokens >= 0, "tokens are out of range");
        nb::gil_scoped_release unlocked;
        niwaki::TileProduct product = product_;
        std::vector<float> wide(bfloat16 ? tokens * product.columns : 0), sums(bfloat16 ? tokens * product.rows : 0);
        for (size_t i = 0; i < wide.size(); ++i) wide[i] = widened(reinterpret_cast<const uint16_t*>(x)[i]);
        product.tokens = tokens, product.x = bfloat16 ? wide.data() : reinterpret_cast<const float*>(x);
        product.out = bfloat16 ? sums.data() : reinterpret_cast<float*>(out);
        niwaki::tile_product(product, threads, static_cast<niwaki::Path>(path));
        for (size_t i = 0; i < sums.size(); ++i) reinterpret_cast<uint16_t*>(out)[i] = narrowed(sums[i]);
    }

    // Same contract as SparseLayer::decode.
    void decode(uintptr_t out, int64_t first, int64_t last, bool bfloat16, int threads, int) const {
        require_rows(first, last, product_.rows);
        nb::gil_scoped_release unlocked;
        niwaki::tile_decode(product_, {first, last, product_.columns, bfloat16, reinterpret_cast<void*>(out)}, threads);
    }

private:
    Bytes places_, codes_;
    Shorts scale_;
    niwaki::TileProduct product_;
};

// What a call with kept inputs brings along: contiguous float32 or bfloat16 at addresses, in float32 here.
struct InputCall {
    InputCall(uintptr_t x, uintptr_t bias, uintptr_t out, int64_t tokens, int64_t inputs, int64_t outputs, bool narrow)
        : to(narrow ? reinterpret_cast<uint16_t*>(out) : nullptr) {
        require(tokens >= 0, "tokens are out of range");
        require_side(inputs, "inputs are out of range"), require_side(outputs, "outputs are out of range");
        if (narrow) widen_all(x, tokens * inputs, wide), widen_all(bias, bias ? outputs : 0, biases);
        sums.resize(narrow ? tokens * outputs : 0);
        values = narrow ? wide.data() : reinterpret_cast<const float*>(x);
        added = !bias ? nullptr : narrow ? biases.data() : reinterpret_cast<const float*>(bias);
        target = narrow ? sums.data() : reinterpret_cast<float*>(out);
    }

    void finish() const {
        for (size_t i = 0; i < sums.size(); ++i) to[i] = narrowed(sums[i]);
    }

    const float *values, *added;
    float* target;

private:
    static void widen_all(uintptr_t from, int64_t count, std::vector<float>& into) {
        into.resize(count);
        for (int64_t i = 0; i < count; ++i) into[i] = widened(reinterpret_cast<const uint16_t*>(from)[i]);
    }

    std::vector<float> wide, biases, sums;
    uint16_t* to;
};

// A matrix of codes by inputs, which the layer keeps alive.
class InputCodesLayer {
public:
    InputCodesLayer(int64_t outputs, int64_t group, Bytes codes, Shorts scale, std::optional<Shorts> offset,
                    std::optional<Bytes> zero, float centre)
        : codes_(codes), scale_(scale), offset_(offset), zero_(zero) {
        require(codes.ndim() == 2, "codes need two axes");
        const auto inputs = static_cast<int64_t>(codes.shape(0));
        require_side(inputs, "inputs are out of range"), require_side(outputs, "outputs are out of range");
        require_side(group, "groups are out of range");
        const int64_t bytes = niwaki::ceil_div(outputs, 128) * 64, groups = niwaki::ceil_div(inputs, group);
        require_shape(codes, {inputs, bytes}, "codes do not fit the outputs");
        require_shape(scale, {groups, 2 * bytes}, "scales do not fit groups and outputs");
        if (offset) require_shape(*offset, {groups, 2 * bytes}, "offsets do not fit groups and outputs");
        if (zero) require_shape(*zero, {groups, 2 * bytes}, "zero codes do not fit groups and outputs");
        product_ = {inputs, outputs, bytes, group, codes.data(), reinterpret_cast<const uint16_t*>(scale.data()),
                    offset ? reinterpret_cast<const uint16_t*>(offset->data()) : nullptr,
                    zero ? zero->data() : nullptr, centre, 0, nullptr, 0, nullptr, nullptr};
    }

    int64_t multiply(uintptr_t x, uintptr_t bias, uintptr_t out, int64_t tokens, bool bfloat16, float threshold,
                     int threads, int path) const {
        nb::gil_scoped_release unlocked;
        niwaki::InputCodesProduct product = product_;
        const InputCall call(x, bias, out, tokens, product.inputs, product.outputs, bfloat16);
        product.tokens = tokens, product.x = call.values, product.threshold = threshold;
        product.bias = call.added, product.out = call.target;
        const int64_t kept = niwaki::input_codes_product(product, threads, static_cast<niwaki::Path>(path));
        call.finish();
        return kept;
    }

private:
    Bytes codes_;
    Shorts scale_;
    std::optional<Shorts> offset_;
    std::optional<Bytes> zero_;
    niwaki::InputCodesProduct product_;
};

}  // namespace

NB_MODULE(_cpu, module) {
    module.doc() = "Compiled CPU kernels; niwaki.kernels checks shapes and chooses between them and torch.";
    module.def("sweep_codes", [](Floats wanted, Floats base, bool has_base, Floats feed, Floats scale, Floats offset,
                                 Ints group, Floats top, std::optional<Bytes> keep, Bytes code, Floats change,
                                 int threads) {
        require(wanted.ndim() == 2 && scale.ndim() == 2, "weights and scales need two axes");
        const auto rows = static_cast<int64_t>(wanted.shape(0)), columns = static_cast<int64_t>(wanted.shape(1));
        const auto groups = static_cast<int64_t>(scale.shape(1));
        require_shape(wanted, {rows, columns}, "weights are not aligned");
        if (has_base) require_shape(base, {rows, columns}, "base does not fit the weights");
        require_shape(feed, {columns, columns}, "feed does not fit the columns");
        require_shape(scale, {rows, groups}, "scales do not fit the rows");
        require_shape(offset, {rows, groups}, "offsets do not fit the rows");
        require_shape(group, {columns}, "groups do not fit the columns");
        require_shape(top, {columns}, "highest codes do not fit the columns");
        if (keep) require_shape(*keep, {rows, columns}, "the mask does not fit the weights");
        require_shape(code, {rows, columns}, "codes do not fit the weights");
        require_shape(change, {rows, columns}, "changes do not fit the weights");
        for (int64_t i = 0; i < columns; ++i)
            require(group.data()[i] >= 0 && group.data()[i] < groups, "a group is out of range");
        const niwaki::SweepCodes sweep{
            static_cast<int64_t>(wanted.shape(0)), static_cast<int64_t>(wanted.shape(1)),
            static_cast<int64_t>(scale.shape(1)), wanted.data(), base.data(), has_base, feed.data(), scale.data(),
            offset.data(), group.data(), top.data(), keep ? keep->data() : nullptr, code.data(), change.data(),
        };
        nb::gil_scoped_release unlocked;
        niwaki::sweep_codes(sweep, threads);
    }, nb::arg("wanted"), nb::arg("base"), nb::arg("has_base"), nb::arg("feed"), nb::arg("scale"), nb::arg("offset"),
       nb::arg("group"), nb::arg("top"), nb::arg("keep").none(), nb::arg("code"), nb::arg("change"), nb::arg("threads"));
    module.def("trellis_encode", [](Floats wanted, Floats weight, Floats level, int64_t bits, Bytes state, int threads) {
        require(wanted.ndim() == 2, "wanted values need two axes");
        const auto rows = static_cast<int64_t>(wanted.shape(0)), columns = static_cast<int64_t>(wanted.shape(1));
        require_side(rows, "rows are out of range"), require_side(columns, "columns are out of range");
        require(bits >= 1 && bits <= 4, "a trellis has 1 to 4 bits");
        require_shape(weight, {rows}, "weights do not fit the rows");
        require_shape(level, {256}, "a trellis has 256 levels");
        require_shape(state, {niwaki::ceil_div(rows, kTile) * kTile, columns}, "states do not fit rows and columns");
        nb::gil_scoped_release unlocked;
        niwaki::trellis_encode({rows, columns, bits, wanted.data(), weight.data(), level.data(), state.data()}, threads);
    }, nb::arg("wanted"), nb::arg("weight"), nb::arg("level"), nb::arg("bits"), nb::arg("state"), nb::arg("threads"));
    module.def("plane_product", [](Bytes planes, Shorts scale, std::optional<Shorts> offset, std::optional<Bytes> zero,
                                   float centre, int64_t group_bytes, std::optional<Ints> column, int64_t columns,
                                   Floats x, Floats out, int threads, int path) {
        require(x.ndim() == 2 && out.ndim() == 2 && x.shape(0) == out.shape(0), "inputs and outputs do not fit");
        std::vector<uint8_t> seen;
        std::vector<niwaki::PlaneProduct> products{
            checked_part(static_cast<int64_t>(out.shape(1)), static_cast<int64_t>(x.shape(1)), planes, scale, offset,
                         zero, centre, group_bytes, column, columns, seen)};
        require(fits_tables(products[0]), "groups are not whole tables");
        products[0].tokens = static_cast<int64_t>(x.shape(0)), products[0].x = x.data(), products[0].out = out.data();
        nb::gil_scoped_release unlocked;
        niwaki::plane_products(products, threads, static_cast<niwaki::Path>(path));
    }, nb::arg("planes"), nb::arg("scale"), nb::arg("offset").none(), nb::arg("zero").none(), nb::arg("centre"),
       nb::arg("group_bytes"), nb::arg("column").none(), nb::arg("columns"), nb::arg("x"), nb::arg("out"),
       nb::arg("threads"), nb::arg("path"));
    nb::class_<Layer>(module, "Layer")
        .def(nb::init<int64_t, int64_t>())
        .def("add", &Layer::add, nb::arg("planes"), nb::arg("scale"), nb::arg("offset").none(), nb::arg("zero").none(),
             nb::arg("centre"), nb::arg("group_bytes"), nb::arg("column").none(), nb::arg("columns"))
        .def("multiply", &Layer::multiply)
        .def("decode", &Layer::decode);
    nb::class_<TrellisLayer>(module, "TrellisLayer")
        .def(nb::init<int64_t, int64_t>())
        .def("add", &TrellisLayer::add, nb::arg("rings"), nb::arg("levels"), nb::arg("scale"),
             nb::arg("column").none())
        .def("multiply", &TrellisLayer::multiply)
        .def("decode", &TrellisLayer::decode);
    nb::class_<TileLayer>(module, "TileLayer")
        .def(nb::init<int64_t, int64_t, int64_t, Bytes, Bytes, Shorts>(), nb::arg("rows"), nb::arg("columns"),
             nb::arg("group"), nb::arg("places"), nb::arg("codes"), nb::arg("scale"))
        .def("multiply", &TileLayer::multiply)
        .def("decode", &TileLayer::decode);
    nb::class_<SparseLayer>(module, "SparseLayer")
        .def(nb::init<int64_t, int, int, Bytes, Bytes, std::optional<Ints>, std::optional<Shorts>, int64_t>(),
             nb::arg("columns"), nb::arg("layout"), nb::arg("kind"), nb::arg("places"), nb::arg("values"),
             nb::arg("starts").none(), nb::arg("scale").none(), nb::arg("group_bytes"))
        .def("multiply", &SparseLayer::multiply)
        .def("decode", &SparseLayer::decode);
    nb::class_<InputCodesLayer>(module, "InputCodesLayer")
        .def(nb::init<int64_t, int64_t, Bytes, Shorts, std::optional<Shorts>, std::optional<Bytes>, float>(),
             nb::arg("outputs"), nb::arg("group"), nb::arg("codes"), nb::arg("scale"), nb::arg("offset").none(),
             nb::arg("zero").none(), nb::arg("centre"))
        .def("multiply", &InputCodesLayer::multiply);
    module.def("inputs_product", [](uintptr_t weight, int kind, int64_t inputs, int64_t outputs, int64_t stride,
                                    uintptr_t x, uintptr_t bias, uintptr_t out, int64_t tokens, bool bfloat16,
                                    float threshold, int threads, int path) {
        require(kind >= 0 && kind <= 2, "the kind of values is unknown");
        require(stride >= outputs && stride <= niwaki::kMaxSide, "rows overlap");
        nb::gil_scoped_release unlocked;
        const InputCall call(x, bias, out, tokens, inputs, outputs, bfloat16);
        const int64_t kept = niwaki::inputs_product(
            {tokens, inputs, outputs, stride, static_cast<niwaki::SparseValues>(kind),
             reinterpret_cast<const uint8_t*>(weight), call.values, threshold, call.added, call.target},
            threads, static_cast<niwaki::Path>(path));
        call.finish();
        return kept;
    });
    module.def("all_finite", [](Bytes bytes, int64_t count, int kind) {
        require(kind >= 0 && kind <= 2, "the kind of values is unknown");
        require(count >= 0 && count <= static_cast<int64_t>(bytes.size()) / (kind == 2 ? 4 : 2), "too few bytes");
        return niwaki::all_finite(bytes.data(), count, static_cast<niwaki::SparseValues>(kind));
    }, nb::arg("bytes"), nb::arg("count"), nb::arg("kind"));
    module.def("pairs_ascend", [](Bytes places) {
        return niwaki::pairs_ascend(places.data(), static_cast<int64_t>(places.size()));
    }, nb::arg("places"));
    module.def("tile_pairs_ascend", [](Bytes places, int64_t rows) {
        require(places.ndim() == 3, "places of tiles need three axes");
        require_side(rows, "rows are out of range");
        const auto lines = static_cast<int64_t>(places.shape(1));
        require_shape(places, {niwaki::ceil_div(rows, kTile), lines, kTile}, "places do not fit the rows");
        return niwaki::tile_pairs_ascend(places.data(), lines, rows);
    }, nb::arg("places"), nb::arg("rows"));
    module.def("scan_bitmap", [](Bytes places, int64_t columns, Ints starts) {
        require(places.ndim() == 2, "places need two axes");
        require_side(columns, "columns are out of range");
        const auto rows = static_cast<int64_t>(places.shape(0));
        require_shape(places, {rows, niwaki::ceil_div(columns, 8)}, "places do not fit the columns");
        require_shape(starts, {rows}, "starts do not fit the rows");
        const niwaki::BitmapScan found = niwaki::scan_bitmap(places.data(), rows, columns, starts.data());
        return nb::make_tuple(found.count, found.beyond, found.ordered);
    }, nb::arg("places"), nb::arg("columns"), nb::arg("starts"));
    // Numbers of `Path`: 0 best, 1 portable, 2 AVX2, 3 AVX-512, 4 AVX-512 with VBMI2 and BF16, 5 with VBMI2 and GFNI, 6 with VBMI and
    // VNNI.
    module.def("supported", [](int path) { return niwaki::supported(static_cast<niwaki::Path>(path)); });
}
