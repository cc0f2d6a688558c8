from numpy.typing import NDArray
from torch import Tensor

def sweep_codes(
    wanted: Tensor,
    base: Tensor,
    has_base: bool,
    feed: Tensor,
    scale: Tensor,
    offset: Tensor,
    group: Tensor,
    top: Tensor,
    keep: Tensor | None,
    code: Tensor,
    change: Tensor,
    threads: int,
) -> None: ...
def trellis_encode(wanted: Tensor, weight: Tensor, level: Tensor, bits: int, state: Tensor, threads: int) -> None: ...
def plane_product(
    planes: NDArray,
    scale: NDArray,
    offset: NDArray | None,
    zero: NDArray | None,
    centre: float,
    group_bytes: int,
    column: NDArray | None,
    columns: int,
    x: NDArray,
    out: NDArray,
    threads: int,
    path: int,
) -> None: ...
def inputs_product(
    weight: int,
    kind: int,
    inputs: int,
    outputs: int,
    stride: int,
    x: int,
    bias: int,
    out: int,
    tokens: int,
    bfloat16: bool,
    threshold: float,
    threads: int,
    path: int,
    /,
) -> int: ...
def supported(path: int, /) -> bool: ...

class Layer:
    def __init__(self, rows: int, inputs: int, /) -> None: ...
    def add(
        self,
        planes: NDArray,
        scale: NDArray,
        offset: NDArray | None,
        zero: NDArray | None,
        centre: float,
        group_bytes: int,
        column: NDArray | None,
        columns: int,
    ) -> None: ...
    def multiply(self, x: int, out: int, tokens: int, bfloat16: bool, threads: int, /) -> None: ...
    def decode(self, out: int, first: int, last: int, bfloat16: bool, threads: int, path: int, /) -> None: ...

class TrellisLayer:
    def __init__(self, rows: int, inputs: int, /) -> None: ...
    def add(self, rings: NDArray, levels: NDArray, scale: NDArray, column: NDArray | None) -> None: ...
    def multiply(self, x: int, out: int, tokens: int, bfloat16: bool, threads: int, path: int, /) -> None: ...
    def decode(self, out: int, first: int, last: int, bfloat16: bool, threads: int, path: int, /) -> None: ...

class SparseLayer:
    def __init__(
        self,
        columns: int,
        layout: int,
        kind: int,
        places: NDArray,
        values: NDArray,
        starts: NDArray | None,
        scale: NDArray | None,
        group_bytes: int,
    ) -> None: ...
    def multiply(self, x: int, out: int, tokens: int, bfloat16: bool, threads: int, path: int, /) -> None: ...
    def decode(self, out: int, first: int, last: int, bfloat16: bool, threads: int, path: int, /) -> None: ...

class TileLayer:
    def __init__(
        self, rows: int, columns: int, group: int, places: NDArray, codes: NDArray, scale: NDArray
    ) -> None: ...
    def multiply(self, x: int, out: int, tokens: int, bfloat16: bool, threads: int, path: int, /) -> None: ...
    def decode(self, out: int, first: int, last: int, bfloat16: bool, threads: int, path: int, /) -> None: ...

class InputCodesLayer:
    def __init__(
        self,
        outputs: int,
        group: int,
        codes: NDArray,
        scale: NDArray,
        offset: NDArray | None,
        zero: NDArray | None,
        centre: float,
    ) -> None: ...
    def multiply(
        self, x: int, bias: int, out: int, tokens: int, bfloat16: bool, threshold: float, threads: int, path: int, /
    ) -> int: ...
