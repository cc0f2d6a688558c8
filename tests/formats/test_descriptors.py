"""Descriptors accept what niwaki writes, and refuse every field and tensor that its format does not allow."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.errors import CheckpointError
from niwaki.formats.descriptors import read_descriptor, read_descriptors, read_shapes
from niwaki.formats.packed import PackedTensors, decode_record, decode_stored
from niwaki.kernels.cpu_module import cpu_module
from niwaki.kernels.planes import prepared_layer
from support.bit_planes import quantized_matrix
from support.packed_records import KINDS, example

Edit = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_the_descriptor_says(kind: str) -> None:
    record = example(kind)
    described = json.loads(json.dumps(record.description))
    found = read_descriptor("m", described)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in record.tensors.items()} == found.shapes()
    assert [found.rows, found.columns] == described["shape"]
    found.check(record.tensors)
    assert decode_record(record.tensors, described).shape == (found.rows, found.columns)


def _part(**fields: Any) -> Edit:
    return lambda about: about["parts"][0].update(fields)


def _trellis(**fields: Any) -> Edit:
    return lambda about: about["trellis"][0].update(fields)


def _sparse(**fields: Any) -> Edit:
    return lambda about: about["sparse"].update(fields)


FIELDS: list[tuple[str, Edit, str]] = [
    ("codes", _part(bits=0), "bits is 0: expected a whole number from 1 to 8"),
    ("codes", _part(bits=70), "bits is 70"),
    ("codes", _part(bits=True), "bits is True"),
    ("codes", _part(bits=4.0), "bits is 4.0"),
    ("codes", _part(bits="4"), "bits is '4'"),
    ("codes", _part(bits=10**30), "bits is 1000000"),
    ("codes", _part(bits=[4]), r"bits is \[4\]"),
    ("codes", _part(group=0), "group is 0"),
    ("codes", _part(grid="hexagonal"), "grid is 'hexagonal': expected affine or"),
    ("codes", _part(grid=None), "grid is None"),
    ("codes", _part(columns=80), "columns of the parts add up to 80: expected 72"),
    ("codes", _part(colour=1), "parts.'colour' is unknown: expected bits, grid, group, columns"),
    ("codes", lambda about: about["parts"][0].pop("group"), "parts.group is missing"),
    ("codes", lambda about: about.update(parts=[]), "parts has 0 entries"),
    ("codes", lambda about: about.update(parts={}), "parts is {}: expected a list"),
    ("codes", lambda about: about.update(parts=[None]), "parts is None: expected an object"),
    ("codes", lambda about: about.update(shape=[40]), "shape is"),
    ("codes", lambda about: about.update(shape=[40, 2**40]), "shape is 1099511627776"),
    ("codes", lambda about: about.update(shape=[-1, 72]), "shape is -1"),
    ("codes", lambda about: about.update(sparse={}), "expected an object with shape, and parts, sparse or trellis"),
    ("trellis", _trellis(bits=0), "bits is 0: expected a whole number from 1 to 4"),
    ("trellis", _trellis(bits=5), "bits is 5"),
    ("trellis", _trellis(bits=True), "bits is True"),
    ("trellis", _trellis(columns=36), "columns of the parts add up to 36: expected 37"),
    ("trellis", _trellis(group=8), "trellis.'group' is unknown: expected bits, columns"),
    ("trellis", lambda about: about.update(trellis=[]), "trellis has 0 entries"),
    ("trellis", lambda about: about.update(trellis={}), "trellis is {}: expected a list"),
    ("trellis", lambda about: about.update(parts=[]), "expected an object with shape, and parts, sparse or trellis"),
    ("mixed", lambda about: about["parts"].append(about["parts"][0]), "parts has 3 entries"),
    ("bitmap-int4", _sparse(group=4), "group is 4: expected a multiple of 8"),
    ("bitmap-int4", _sparse(group=0), "group is 0"),
    ("bitmap-int4", lambda about: about["sparse"].pop("group"), "group is 0"),
    ("bitmap-bfloat16", _sparse(group=8), "group is 8: expected none for bfloat16"),
    ("bitmap-bfloat16", _sparse(values="int7"), "values is 'int7'"),
    ("bitmap-bfloat16", _sparse(layout="map"), "layout is 'map'"),
    ("bitmap-bfloat16", _sparse(bytes=3), "bytes is 3"),
    ("two_four-bfloat16", _sparse(values="float32"), "bytes is .*: expected"),
    ("tiles", _sparse(group=48), "group is 48: expected a multiple of 32"),
    ("tiles", _sparse(values="int8"), "values is 'int8': expected int4"),
    ("tiles", lambda about: about.update(shape=[40, 72]), "72 columns: expected a multiple of 32"),
    ("tiles", _sparse(bytes=64), "bytes is 64"),
]


@pytest.mark.parametrize(("kind", "edit", "message"), FIELDS)
def test_a_field_out_of_its_range_is_named(kind: str, edit: Edit, message: str) -> None:
    described = json.loads(json.dumps(example(kind).description))
    edit(described)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_descriptor("layers.3.up", described)
    assert "layers.3.up" in str(caught.value) and "\n" not in str(caught.value)


def test_a_description_that_only_looks_like_a_known_one_is_read_again() -> None:
    """Read true in place of 1, a changed description, and the same one for another module."""
    about: dict[str, Any] = {"shape": [8, 16], "parts": [{"bits": 1, "grid": "affine", "group": 8, "columns": 16}]}
    known = read_descriptor("one", about)
    assert read_descriptor("one", copy.deepcopy(about)) is known
    assert read_descriptor("other", about).module == "other"
    about["parts"][0]["bits"] = 2
    assert read_descriptor("one", about) != known
    about["parts"][0]["bits"] = True
    with pytest.raises(CheckpointError, match="bits is True"):
        read_descriptor("one", about)


@pytest.mark.parametrize("wrong", [None, 3, "x", [], [{}]])
def test_sections_that_are_no_objects_are_named(wrong: Any) -> None:
    with pytest.raises(CheckpointError, match=r"quantization_config\.modules is"):
        read_descriptors(wrong)
    with pytest.raises(CheckpointError, match=r"quantization_config\.shapes is"):
        read_shapes(wrong)
    with pytest.raises(CheckpointError, match="m wrongly"):
        read_descriptors({"m": wrong})
    with pytest.raises(CheckpointError, match="shape is"):
        read_shapes({"m": wrong})


def _set(name: str, index: Any, value: int) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name][index] = value

    return edit


INFINITE = 0x7C00
TENSORS: list[tuple[str, Callable[[dict[str, Tensor]], object], str]] = [
    ("codes", _set("scale_0", (0, 3), INFINITE), "scale_0 holds NaN or infinite"),
    ("codes", lambda t: t.pop("zero_0"), r"zero_0 is missing: expected uint8 \[4, 29\]"),
    ("codes", lambda t: t.update(planes_0=t["planes_0"][:1]), r"planes_0 is uint8 \[1, .*: expected uint8 \[2"),
    ("codes", lambda t: t.update(scale_0=t["scale_0"].float()), "scale_0 is float32"),
    ("mixed", _set("columns", 0, 0), "columns picks .* columns: expected 25, as part 0 has"),
    ("mixed", _set("columns", -1, 255), "columns sets .* bits after the last of 76"),
    ("bitmap-bfloat16", _set("starts", 5, -(2**31)), "starts does not count"),
    ("bitmap-bfloat16", _set("starts", 5, 2**31 - 1), "starts does not count"),
    ("bitmap-bfloat16", _set("places", (1, 0), 255), "places marks .* values of"),
    ("bitmap-bfloat16", lambda t: t["values"][:64].view(torch.bfloat16).fill_(torch.inf), "values holds NaN"),
    ("bitmap-int4", _set("scale", (0, 0), 0x7E00), "scale holds NaN"),
    ("two_four-int8", _set("places", (3, 2), 0b01_01_00_11), "places holds a pair"),
    ("two_four-bfloat16", _set("places", (0, -1), 0), "places holds a pair"),
    ("tiles", _set("places", (1, 0, 3), 0), "places holds a pair"),
    ("tiles", _set("scale", (0, 0), INFINITE), "scale holds NaN"),
]


@pytest.mark.parametrize(("kind", "edit", "message"), TENSORS)
def test_a_tensor_that_breaks_its_format_is_named(kind: str, edit: Any, message: str) -> None:
    record = example(kind)
    tensors = {name: tensor.clone() for name, tensor in record.tensors.items()}
    edit(tensors)
    with pytest.raises(CheckpointError, match=rf"^layers\.3\.up\.{message}"):
        decode_stored(
            {f"layers.3.up.{n}": t for n, t in tensors.items()}, {"layers.3.up": record.description}, torch.float32
        )


def test_a_plain_weight_beside_a_packed_one_is_refused() -> None:
    record = example("codes")
    tensors = {f"m.{name}": tensor for name, tensor in record.tensors.items()} | {"m.weight": torch.zeros(40, 72)}
    with pytest.raises(CheckpointError, match=r"m is packed and has a plain m\.weight too"):
        decode_stored(tensors, {"m": record.description}, torch.float32)


def test_the_kernels_refuse_what_would_touch_memory() -> None:
    """Call them without the descriptor, which is in front of them."""
    from niwaki.runtime.linear import PackedLinear

    compiled = cpu_module()
    assert compiled is not None
    record = PackedTensors.of_codes(quantized_matrix(40, 76, 2, "affine", 8, True), (40, 76))
    layer = PackedLinear(40, 76, record.description, False)
    layer.load_state_dict(dict(record.tensors))
    parts = [layer._part(0, layer.described[0]), layer._part(1, layer.described[1])]
    prepared_layer(parts, 40, 76)
    bad = [
        {"columns": 300}, {"group": 4}, {"group": 2**40}, {"planes_TKBR": parts[0].planes_TKBR[:1]},
        {"planes_TKBR": parts[0].planes_TKBR[0]}, {"scale_GO": parts[0].scale_GO[:, :9].contiguous()},
        {"columns_C": parts[0].columns_C + 70}, {"columns_C": torch.zeros_like(parts[0].columns_C)},
        {"columns_C": None},
    ]  # fmt: skip
    for fields in bad:
        with pytest.raises(ValueError, match="niwaki kernels"):
            prepared_layer([parts[0]._replace(**fields), parts[1]], 40, 76)
    out = torch.zeros(40, 76)
    half = prepared_layer(parts[:1], 40, 76)
    with pytest.raises(ValueError, match="do not make a matrix"):
        half.decode(out.data_ptr(), 0, 40, False, 1, 0)
    whole = prepared_layer(parts, 40, 76)
    with pytest.raises(ValueError, match="rows are out of range"):
        whole.decode(out.data_ptr(), 0, 41, False, 1, 0)


@pytest.mark.parametrize(
    "wrong",
    [{"starts": 1}, {"starts": -1}, {"values": 65}, {"layout": 2}, {"kind": 9}, {"group_bytes": 0}, {"columns": 64},
     {"columns": -1}, {"columns": 2**40}],
)  # fmt: skip
def test_the_kernels_refuse_nonzeros_that_would_touch_memory(wrong: dict[str, int]) -> None:
    compiled = cpu_module()
    assert compiled is not None
    record = example("bitmap-int4")
    t = {name: tensor.clone() for name, tensor in record.tensors.items()}
    if "starts" in wrong:
        t["starts"][3] += wrong["starts"] * 2**30
    values = t["values"][: wrong.get("values", len(t["values"]))]
    arguments = (wrong.get("layout", 0), wrong.get("kind", 4), t["places"].numpy(), values.numpy(), t["starts"].numpy())
    with pytest.raises(ValueError, match="niwaki kernels"):
        compiled.SparseLayer(wrong.get("columns", 72), *arguments, t["scale"].numpy(), wrong.get("group_bytes", 1))
    compiled.SparseLayer(72, 0, 4, *(record.tensors[n].numpy() for n in ("places", "values", "starts", "scale")), 1)
    assert copy.deepcopy(record)  # the record itself is unchanged
