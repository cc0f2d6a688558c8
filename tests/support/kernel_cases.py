"""Random arguments of the kernels that compress."""

import torch
from torch import Tensor

from niwaki.kernels.types import ColumnGroups, Grid, Levels


def latent_case(rows: int, bounds: tuple[int, ...], tops: list[float]) -> tuple[Tensor, Levels, Tensor]:
    """Return latent weights, their levels, and gradients of the weights."""
    generator = torch.Generator().manual_seed(rows)
    columns, groups = bounds[-1], len(tops)
    scale = torch.rand(rows, groups, generator=generator) + 0.2
    offset = torch.randn(rows, groups, generator=generator)
    shape = ColumnGroups(
        bounds,
        torch.tensor(bounds, dtype=torch.int32),
        torch.tensor(tops),
        torch.randperm(columns, generator=generator),
    )
    latent = 2 * torch.randn(rows, columns, generator=generator)
    return latent, Levels(shape, scale, offset), torch.randn(rows, columns, generator=generator)


def rank_case(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients, values, order, ranks and the number of zeros per row: none, all, and between."""
    generator = torch.Generator().manual_seed(rows * columns)
    gradient, values = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    order = torch.stack([torch.randperm(columns, generator=generator) for _ in range(rows)])
    zeros = torch.randint(0, columns + 1, (rows,), generator=generator)
    zeros[0], zeros[-1] = 0, columns
    return gradient, values, order, order.argsort(dim=1), zeros


def cuts_of(columns: int) -> Tensor:
    """Return 12 cuts of a row, from none of its columns to all."""
    return (torch.linspace(0, 1, 12) * columns + 1e-4).floor()


def sweep_case(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Grid]:
    """Return wanted values, a base, a feed and a grid of two groups (4 bits and 1 bit)."""
    generator = torch.Generator().manual_seed(seed)
    wanted, base = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    feed = torch.randn(columns, columns, generator=generator) * 0.1
    group = (torch.arange(columns) >= columns // 3).to(torch.int32)
    top = torch.where(group == 0, 15.0, 1.0)
    scale = torch.rand(rows, 2, generator=generator) + torch.tensor([0.2, 1.0])
    offset = -scale * torch.tensor([7.5, 0.5])
    return wanted, base, feed, Grid(scale, offset, group, top)


def masked_sweep_case(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Grid, Tensor]:
    """Return `sweep_case` on grids with a level at zero, with half of the weights kept."""
    wanted, base, feed, grid = sweep_case(rows, columns)
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(7)) < 0.5
    middle = Grid(grid.scale_OG, -grid.scale_OG * torch.tensor([8.0, 1.0]), grid.group_I, grid.top_I)
    return wanted, base, feed, middle, keep
