"""One small record of every kind of packed matrix, as a file stores it."""

from functools import cache

from niwaki.formats.packed import PackedTensors
from support.bit_planes import quantized_matrix
from support.sparse_records import record_of, tiled
from support.trellis_records import trellis_matrix

CODES = {
    "codes": (4, "affine", 16, False),
    "codes-symmetric": (3, "symmetric", 8, False),
    "codes-midrise": (1, "midrise", 72, False),
    "codes-free": (8, "free", 24, False),
    "codes-small-groups": (2, "affine", 4, False),
    "mixed": (4, "affine", 8, True),
}
NONZEROS = [
    f"{layout}-{kind}"
    for layout in ("bitmap", "two_four")
    for kind in ("bfloat16", "float16", "float32", "int8", "int4")
]
TRELLIS = {"trellis": (2, None), "trellis-1": (1, None), "trellis-4": (4, None), "trellis-mixed": (2, 3)}
KINDS = [*CODES, *NONZEROS, "tiles", *TRELLIS]


@cache
def example(kind: str) -> PackedTensors:
    """Return a record of 40 or 45 rows. Do not write into it."""
    if kind in CODES:
        bits, grid, group, mixed = CODES[kind]
        rows, columns = 45, 76 if mixed else 72
        return PackedTensors.of_codes(quantized_matrix(rows, columns, bits, grid, group, mixed), (rows, columns))
    if kind in TRELLIS:
        rows, columns = 45, 37
        return PackedTensors.of_trellis(trellis_matrix(rows, columns, *TRELLIS[kind]), (rows, columns))
    if kind == "tiles":
        return PackedTensors.of_nonzeros(tiled(40, 96, 32))
    layout, _, values = kind.partition("-")
    return PackedTensors.of_nonzeros(record_of(40, 72, values, layout, 8))
