"""Learning of codes and scales inside one block, so that its output survives (see `block_training`).

Every matrix keeps latent weights V, its scales and its free offsets. The forward uses what would be stored: code =
round((V − offset) / scale), clamped to the levels. The backward passes the gradient g of the weight straight to V
(Bengio et al. 2013). To scale and offset it passes Σ g · code and Σ g over a group. All parameters of a block train
together, as in EfficientQAT (Chen et al. 2025). V starts at the point of its code's cell that is nearest to the
dense weight. So codes from coordinate descent are kept, and doubtful ones change first.

Legend: O rows, I columns in the order of the sweep, G groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from niwaki.formats.quantized import SCALE_DTYPE
from niwaki.kernels.latent import codes_of, gradients_of, weights_of
from niwaki.kernels.types import ColumnGroups, Levels
from niwaki.methods.shared.best_state import BestState
from niwaki.methods.shared.block_training import Reconstruction, Schedule, take_step, training_batches
from niwaki.methods.shared.rounding import SMALLEST_SCALE, Rounded

CELL_FRAC = 0.45  # how far from its level a latent weight may start, in steps
SCALE_RATE = 0.1  # of the weights' rate, both relative to their size


@dataclass
class Latent:
    """Learned tensors of one matrix: V, scales and offsets. The rest stays as `rounded` has it.

    `groups` says which columns share a scale, and which column of the matrix each column here is. `free_G`: groups that
    learn an offset of their own; `fixed_OG`: offset over scale of the others, 0 for free ones.
    """

    rounded: Rounded
    groups: ColumnGroups
    free_G: Tensor
    fixed_OG: Tensor
    weight_OI: Tensor
    scale_OG: Tensor
    offset_OG: Tensor

    @classmethod
    def start(cls, rounded: Rounded, weight_OI: Tensor, order_I: Tensor) -> "Latent":
        """Start from the codes of `rounded` and the dense weights, columns in the order `order_I`."""
        groups, device = rounded.groups, weight_OI.device
        bounds = [group.start for group in groups] + [groups[-1].end]
        tops_G = torch.tensor([2.0**group.bits - 1 for group in groups], device=device)
        free_G = torch.tensor([group.grid == "free" for group in groups], device=device)
        fixed_OG = torch.where(free_G, 0.0, rounded.offset_OG / rounded.scale_OG)
        group_I = rounded.grid.group_I.long()
        values_OI, scale_OI = rounded.values_OI, rounded.scale_OG[:, group_I]
        # The outer cells have no outer wall; one step is far enough to be sure.
        down_OI = torch.where(rounded.code_OI == 0, 1.0, CELL_FRAC) * scale_OI
        up_OI = torch.where(rounded.code_OI == rounded.grid.top_I, 1.0, CELL_FRAC) * scale_OI
        latent_OI = torch.minimum(torch.maximum(weight_OI, values_OI - down_OI), values_OI + up_OI)
        column_groups = ColumnGroups(
            tuple(bounds), torch.tensor(bounds, dtype=torch.int32, device=device), tops_G, order_I
        )
        return cls(
            rounded, column_groups, free_G, fixed_OG, latent_OI, rounded.scale_OG.clone(), rounded.offset_OG.clone()
        )

    def levels(self) -> Levels:
        """Return scales and offsets as they would be stored now."""
        scale_OG = self.scale_OG.to(SCALE_DTYPE).float().clamp_min(SMALLEST_SCALE)
        offset_OG = torch.where(self.free_G, self.offset_OG.to(SCALE_DTYPE).float(), self.fixed_OG * scale_OG)
        return Levels(self.groups, scale_OG, offset_OG)

    def current(self) -> Rounded:
        """Return the present codes and scales."""
        levels = self.levels()
        code_OI = codes_of(self.weight_OI, levels).to(torch.uint8)
        return replace(self.rounded, code_OI=code_OI, scale_OG=levels.scale_OG, offset_OG=levels.offset_OG)

    def set_gradients(self, gradient_OI: Tensor, levels: Levels) -> None:
        """Set the gradients of V, scales and offsets from that of the matrix."""
        by_latent_OI, by_code_OG, by_one_OG = gradients_of(self.weight_OI, levels, gradient_OI)
        self.weight_OI.grad = by_latent_OI
        self.scale_OG.grad = by_code_OG + self.fixed_OG * by_one_OG
        self.offset_OG.grad = by_one_OG * self.free_G


def learn(
    task: Reconstruction,
    start: Mapping[str, Latent],
    schedule: Schedule,
    generator: torch.Generator,
) -> tuple[dict[str, Rounded], BestState]:
    """Learn, and return the codes with the lowest held-out error; the start, if learning never lowered it."""
    groups: list[dict[str, Any]] = []
    for latent in start.values():
        size = float(latent.weight_OI.square().mean().sqrt())
        scale = float(latent.scale_OG.square().mean().sqrt())
        groups.append({"params": [latent.weight_OI], "size": size})
        groups.append({"params": [latent.scale_OG, latent.offset_OG], "size": scale * SCALE_RATE})
    optimizer = schedule.make_optimizer(groups)

    def matrices(levels: Mapping[str, Levels]) -> dict[str, Tensor]:
        return {
            name: weights_of(latent.weight_OI, levels[name], task.block.weight(name).dtype)
            for name, latent in start.items()
        }

    def levels() -> dict[str, Levels]:
        return {name: latent.levels() for name, latent in start.items()}

    def heldout() -> float:
        return task.error(matrices(levels()))

    tensors = [tensor for group in groups for tensor in group["params"]]
    best = BestState(tensors, heldout())
    for batch in training_batches(task, schedule, generator):
        now = levels()
        gradients = task.gradients(matrices(now), batch.windows)
        for name, latent in start.items():
            latent.set_gradients(gradients.pop(name), now[name])
        take_step(optimizer, batch.rate)
        if batch.measure:
            best.offer(heldout())
    best.restore()
    return {name: latent.current() for name, latent in start.items()}, best
