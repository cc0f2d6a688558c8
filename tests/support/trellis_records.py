"""Random matrices that a trellis codes."""

import torch

from niwaki.formats.trellis import RING, TrellisColumns, unpack_rings
from niwaki.kernels.types import TrellisPart


def trellis_matrix(
    rows: int, columns: int, bits: int, others: int | None = None, seed: int = 0
) -> list[TrellisColumns]:
    """Return one part, or two with a third of the columns in the first one."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(columns, generator=generator)
    count = columns if others is None else columns // 3
    picked = [(order[:count].sort().values, bits)]
    if others is not None:
        picked.append((order[count:].sort().values, others))
    parts = []
    for columns_C, own in picked:
        shape = (-(-rows // RING), len(columns_C), 4 * own)
        rings = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        level = torch.randint(-127, 128, (256,), generator=generator, dtype=torch.int8)
        scale = (torch.rand(rows, generator=generator) * 0.02 + 0.001).half()
        parts.append(TrellisColumns(columns_C, own, unpack_rings(rings), level, scale))
    return parts


def kernel_parts(parts: list[TrellisColumns]) -> list[TrellisPart]:
    """Return the parts as the kernels take them."""
    stored = [part.tensors() for part in parts]
    mixed = len(parts) > 1
    return [
        TrellisPart(own["rings"], own["levels"], own["scale"][0], part.columns_C.int() if mixed else None)
        for part, own in zip(parts, stored, strict=True)
    ]
