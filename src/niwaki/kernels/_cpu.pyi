from numpy.typing import NDArray
from torch import Tensor

def sweep_codes(
    wanted_OI: Tensor,
    base_OI: Tensor,
    has_base: bool,
    feed_II: Tensor,
    scale_OG: Tensor,
    offset_OG: Tensor,
    group_I: Tensor,
    top_I: Tensor,
    code_OI: Tensor,
    change_OI: Tensor,
    threads: int,
    /,
) -> None: ...
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
