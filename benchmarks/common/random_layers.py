"""Layers of random packed weights, on the CPU or made on a GPU."""

from typing import Any

import torch

from niwaki.formats.quantized import QuantizedColumns, stored_tensors
from niwaki.formats.sparse import Sparse
from niwaki.formats.sparse_tiles import Tiled
from niwaki.runtime.linear import PackedLinear
from niwaki.runtime.sparse_linear import SparseLinear

LAYERS = ["1.6 bit", "4 bit"]
FREE, MIDRISE, SYMMETRIC = "free", "midrise", "symmetric"


def layer_parts(layer: str, columns: int) -> list[dict[str, Any]]:
    """Describe the parts of a layer of LAYERS.

    1.6 bit: a fifth of the columns at 4 bits, the rest at 1 bit, one scale per row each. 4 bit: groups of 128.
    """
    if layer == "4 bit":
        return [{"bits": 4, "grid": SYMMETRIC, "group": 128, "columns": columns}]
    wide = round(0.2 * columns / 8) * 8
    return [
        {"bits": 4, "grid": MIDRISE, "group": wide, "columns": wide},
        {"bits": 1, "grid": FREE, "group": columns - wide, "columns": columns - wide},
    ]


def random_layer(layer: str, rows: int, columns: int, device: str = "cuda") -> PackedLinear:
    """Return random planes, weights of about ±0.02, made on the device. Rows and columns are whole tiles and bytes."""
    with torch.device(device):
        packed = PackedLinear(rows, columns, {"parts": layer_parts(layer, columns)}, bias=False)
        for name, buffer in packed.named_buffers():
            if name.startswith("planes"):
                buffer.copy_(torch.randint(0, 256, buffer.shape, dtype=torch.uint8))
        for number, about in enumerate(packed.described):
            spread = 0.04 / (2 ** about["bits"] - 1)
            scale_GO = packed.get_buffer(f"scale_{number}")
            scale_GO.copy_((spread * (0.5 + torch.rand(scale_GO.shape))).half().view(torch.int16))
            if about["grid"] == FREE:
                offset = (-0.02 * (0.5 + torch.rand(scale_GO.shape))).half().view(torch.int16)
                packed.get_buffer(f"offset_{number}").copy_(offset)
        if len(packed.described) > 1:
            first_I = torch.zeros(columns, dtype=torch.uint8)
            first_I[torch.randperm(columns)[: packed.described[0]["columns"]]] = 1
            packed.columns.copy_((first_I.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8))
    return packed


def packed_layer(rows: int, columns: int, salient_frac: float) -> PackedLinear:
    """Return a layer with `salient_frac` of the columns at 4 bits, the rest at 1 bit, one scale per row each."""
    generator = torch.Generator().manual_seed(0)
    count = round(salient_frac * columns / 8) * 8
    order_I = torch.randperm(columns, generator=generator)
    parts = []
    for columns_C, bits, grid in ((order_I[:count], 4, "midrise"), (order_I[count:], 1, "free")):
        if not len(columns_C):
            continue
        code_OC = torch.randint(0, 2**bits, (rows, len(columns_C)), generator=generator, dtype=torch.uint8)
        scale_OG = (torch.rand(rows, 1, generator=generator) * 0.01 + 0.01).half()
        offset_OG = torch.randn(rows, 1, generator=generator).half() * 0.01 if grid == "free" else None
        columns_C = columns_C.sort().values
        parts.append(QuantizedColumns(columns_C, bits, grid, len(columns_C), code_OC, scale_OG, offset_OG))
    layer = PackedLinear(rows, columns, {"parts": [part.describe() for part in parts]}, bias=False)
    layer.load_state_dict(stored_tensors(parts, columns))
    return layer


def sparse_layers(rows: int, columns: int) -> dict[str, SparseLinear]:
    """Return layers of half zeros: anywhere, and two of four in bfloat16 and as 4-bit codes in groups of 128."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(rows, columns, generator=generator).bfloat16()
    score_OGM = torch.rand(rows, columns // 4, 4, generator=generator)
    zero = weight_OI.new_zeros(())
    keep_OI = (score_OGM >= score_OGM.topk(2, dim=2).values[..., 1:]).view(rows, columns)
    code_OI = torch.where(keep_OI, torch.randint(0, 16, (rows, columns), generator=generator), 8).to(torch.uint8)
    scale_OG = (torch.rand(rows, columns // 128, generator=generator) * 0.01 + 0.01).half()
    codes = Sparse.encode_codes(
        QuantizedColumns(torch.arange(columns), 4, "symmetric", 128, code_OI, scale_OG), keep_OI, layout="two_four"
    )
    tiled = None if codes is None else Tiled.encode(codes)
    assert tiled is not None
    records: dict[str, Sparse | Tiled] = {
        "bitmap 50%": Sparse.encode(torch.where(score_OGM.view(rows, columns) < 0.5, weight_OI, zero), layout="bitmap"),
        "2:4": Sparse.encode(torch.where(keep_OI, weight_OI, zero), layout="two_four"),
        "2:4 + 4 bit": tiled,
    }
    layers = {}
    for name, record in records.items():
        layers[name] = SparseLinear(rows, columns, record.describe(), bias=False)
        layers[name].load_state_dict(record.tensors())
    return layers
