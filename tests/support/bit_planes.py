"""Quantized matrices in bit planes, and the error of products with them."""

import torch

from niwaki.formats.quantized import QuantizedColumns, centre
from niwaki.kernels.types import PlanePart


def quantized_matrix(rows: int, columns: int, bits: int, grid: str, group: int, mixed: bool) -> list[QuantizedColumns]:
    """Return one part, or two with mixed columns: the second has one bit and one scale per row."""
    generator = torch.Generator().manual_seed(rows + columns)
    order = torch.randperm(columns, generator=generator)
    first = order[: columns // 3].sort().values if mixed else torch.arange(columns)
    parts = []
    for columns_C, own_bits, own_grid, own_group in [
        (first, bits, grid, group), (order[columns // 3 :].sort().values, 1, "free", columns),
    ][: 1 + mixed]:  # fmt: skip
        width = len(columns_C)
        groups = -(-width // own_group)
        code = torch.randint(0, 2**own_bits, (rows, width), generator=generator, dtype=torch.uint8)
        scale = (torch.rand(rows, groups, generator=generator) + 0.1).half()
        offset = torch.randn(rows, groups, generator=generator).half() if own_grid == "free" else None
        zero = torch.randint(0, 2**own_bits, (rows, groups), generator=generator, dtype=torch.uint8)
        parts.append(QuantizedColumns(columns_C, own_bits, own_grid, min(own_group, width), code, scale, offset,
                          zero if own_grid == "affine" else None))  # fmt: skip
    return parts


def planes_of(parts: list[QuantizedColumns]) -> list[PlanePart]:
    """Return the parts as the GPU kernels take them."""
    return [part.for_gpu() for part in cpu_planes_of(parts)]


def cpu_planes_of(parts: list[QuantizedColumns]) -> list[PlanePart]:
    """Return the parts as the CPU kernels take them."""
    found = []
    for part in parts:
        tensors = part.tensors()
        given = PlanePart(
            tensors["planes"],
            tensors["scale"],
            tensors.get("offset"),
            None if part.zero_OG is None else part.zero_OG.T.contiguous(),
            part.columns_C.int() if len(parts) > 1 else None,
            0.0 if part.grid in ("free", "affine") else centre(part.bits, part.grid),
            len(part.columns_C),
            part.group,
        )
        found.append(given)
    return found


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖."""
    return float((found.double() - expected).norm() / expected.norm())


class OnGpu(torch.Tensor):
    """Tensor that claims to be on a GPU."""

    is_cuda = True  # type: ignore[assignment]
