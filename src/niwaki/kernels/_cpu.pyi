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
    planes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    zero: Tensor | None,
    centre: float,
    group_bytes: int,
    column: Tensor | None,
    columns: int,
    x: Tensor,
    out: Tensor,
    threads: int,
    portable: bool,
) -> None: ...
