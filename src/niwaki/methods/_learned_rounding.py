"""Learning codes and scales inside one block, so that its output survives (see `_reconstruct`).

Every matrix keeps latent weights V, its scales and its free offsets. The forward uses what would be stored,
code = round((V − offset) / scale) clamped to the levels; the backward passes the gradient of the weight straight to
V, and to scale and offset as Σ g · code and Σ g over a group (Bengio et al. 2013, straight-through; block-wise
training of all parameters as in EfficientQAT, Chen et al. 2025). V starts at the point of its code's cell nearest to
the dense weight, so that codes that were found by descent are kept, and doubtful ones turn first.

Legend: O rows, I columns in the order of the sweep, G groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from niwaki.learning import Lowest
from niwaki.methods._reconstruct import Reconstruction, Schedule, follow
from niwaki.methods._rounding import SMALLEST_SCALE, Rounded

CELL_FRAC = 0.45  # how far from its level a latent weight may start, in steps
SCALE_RATE = 0.1  # of the weights' rate, both relative to their size


@dataclass
class Latent:
    """What is learned of one matrix. `order_I` names the column of the matrix behind every column here."""

    rounded: Rounded
    order_I: Tensor
    weight_OI: Tensor
    scale_OG: Tensor
    offset_OG: Tensor

    @classmethod
    def start(cls, rounded: Rounded, weight_OI: Tensor, order_I: Tensor) -> "Latent":
        """From codes already found, and the dense weights (columns in their order)."""
        group_I = rounded.grid.group_I.long()
        values_OI, scale_OI = rounded.values_OI, rounded.scale_OG[:, group_I]
        # The outer cells have no outer wall; one step is far enough to be sure.
        down_OI = torch.where(rounded.code_OI == 0, 1.0, CELL_FRAC) * scale_OI
        up_OI = torch.where(rounded.code_OI == rounded.grid.top_I, 1.0, CELL_FRAC) * scale_OI
        latent_OI = torch.minimum(torch.maximum(weight_OI, values_OI - down_OI), values_OI + up_OI)
        return cls(rounded, order_I, latent_OI, rounded.scale_OG.clone(), rounded.offset_OG.clone())

    def current(self) -> Rounded:
        """The codes and scales as they stand."""
        scale_OG = self.scale_OG.clamp_min(SMALLEST_SCALE)
        offset_OG = torch.where(self.free_G, self.offset_OG, self.rounded.offset_OG / self.rounded.scale_OG * scale_OG)
        shaped = replace(self.rounded, scale_OG=scale_OG, offset_OG=offset_OG).storable()
        group_I = shaped.grid.group_I.long()
        exact_OI = (self.weight_OI - shaped.offset_OG[:, group_I]) / shaped.scale_OG[:, group_I]
        code_OI = torch.minimum(exact_OI.round_().clamp_(min=0), shaped.grid.top_I).to(torch.uint8)
        return replace(shaped, code_OI=code_OI)

    @property
    def free_G(self) -> Tensor:
        """Which groups learn an offset of their own."""
        free = [group.grid == "free" for group in self.rounded.groups]
        return torch.tensor(free, device=self.scale_OG.device)

    def dense(self, rounded: Rounded) -> Tensor:
        """The matrix [O, I] with its columns in their places."""
        weight_OI = torch.empty_like(self.weight_OI)
        weight_OI[:, self.order_I] = rounded.values_OI
        return weight_OI

    def gradients(self, gradient_OI: Tensor, rounded: Rounded) -> tuple[Tensor, Tensor, Tensor]:
        """Of V, scales and offsets, from that of the matrix."""
        g_OI = gradient_OI[:, self.order_I].float()
        group_I = rounded.grid.group_I.long()
        fixed_OG = torch.where(self.free_G, 0.0, self.rounded.offset_OG / self.rounded.scale_OG)
        by_scale_OG = torch.zeros_like(self.scale_OG)
        by_scale_OG.index_add_(1, group_I, g_OI * (rounded.code_OI + fixed_OG[:, group_I]))
        by_offset_OG = torch.zeros_like(self.offset_OG).index_add_(1, group_I, g_OI)
        return g_OI, by_scale_OG, by_offset_OG * self.free_G


def learn(
    task: Reconstruction,
    start: Mapping[str, Latent],
    schedule: Schedule,
    generator: torch.Generator,
) -> tuple[dict[str, Rounded], Lowest]:
    """Descends and returns the codes of the lowest held-out error; the start itself, if learning never lowered it."""
    groups: list[dict[str, Any]] = []
    for latent in start.values():
        size = float(latent.weight_OI.square().mean().sqrt())
        scale = float(latent.scale_OG.square().mean().sqrt())
        groups.append({"params": [latent.weight_OI], "size": size})
        groups.append({"params": [latent.scale_OG, latent.offset_OG], "size": scale * SCALE_RATE})
    optimizer = schedule.make_optimizer(groups)

    def current() -> dict[str, Rounded]:
        return {name: latent.current() for name, latent in start.items()}

    def heldout() -> float:
        return task.error({name: start[name].dense(rounded) for name, rounded in current().items()})

    tensors = [tensor for group in groups for tensor in group["params"]]
    lowest = Lowest(tensors, heldout())
    for windows in follow(task, schedule, optimizer, generator, lambda: None, lambda: lowest.offer(heldout())):
        now = current()
        found = task.gradients({name: start[name].dense(rounded) for name, rounded in now.items()}, windows)
        for name, latent in start.items():
            gradients = latent.gradients(found[name], now[name])
            latent.weight_OI.grad, latent.scale_OG.grad, latent.offset_OG.grad = gradients
    lowest.restore()
    return current(), lowest
