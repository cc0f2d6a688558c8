"""Learning of codes and scales inside one block, so that its output survives (see `block_training`).

Every matrix keeps latent weights V, its scales and its free offsets. The forward uses what would be stored: code =
round((V − offset) / scale), clamped to the levels. The backward passes the gradient g of the weight straight to V
(Bengio et al. 2013). To scale and offset it passes Σ g · code and Σ g over a group. A zero code of an affine grid gets
the gradient of the weights outside the levels, which alone move with the range. All parameters of a block train
together, as in EfficientQAT (Chen et al. 2025). V starts at the point of its code's cell that is nearest to the
dense weight. So codes from coordinate descent are kept, and doubtful ones change first.

Legend: O rows, I columns in the order of the sweep, G groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from niwaki.data.statistics import Needs
from niwaki.formats.quantized import SCALE_DTYPE
from niwaki.kernels.latent import codes_of, gradients_of, weights_of
from niwaki.kernels.types import ColumnGroups, Levels
from niwaki.methods.cost import Scope, Work
from niwaki.methods.shared.best_state import BestState
from niwaki.methods.shared.block_training import Reconstruction, Schedule, take_step, training_batches
from niwaki.methods.shared.learning_options import LearningConfig, learning_cost, learning_needs
from niwaki.methods.shared.rounding import SMALLEST_SCALE, Rounded

KEPT_START = "learning did not lower the held-out block error: the codes found before it were kept"
EVEN = ("affine", "symmetric")  # grids with one width for all columns
CELL_FRAC = 0.45  # how far from its level a latent weight may start, in steps
SCALE_RATE = 0.1  # of the weights' rate, both relative to their size


class CodeLearning(LearningConfig, Protocol):
    """Options that the Configs of methods that learn codes have."""

    @property
    def learn_rounds(self) -> int:
        """Return the rounds of learning, 0 for none."""

    @property
    def target(self) -> str:
        """Return the output to learn."""

    @property
    def reconstruct(self) -> str:
        """Return the outputs that weights are learned from."""

    @property
    def ahead(self) -> int:
        """Return the following blocks whose outputs count."""

    @property
    def kl(self) -> float:
        """Return the weight of the divergence of logits."""


def code_learning_needs(config: CodeLearning) -> Needs:
    """Ask for what the learning of codes needs; nothing without rounds."""
    if not config.learn_rounds:
        return Needs()
    return learning_needs(config.batch, config.target, config.ahead, config.kl)


def code_learning_cost(scope: Scope, config: CodeLearning) -> Work:
    """Count the learning of codes: latent weights and their rounding beside the block."""
    return learning_cost(
        scope, config.learn_rounds, config.samples, config.batch, copies=7, passes=36, reconstruct=config.reconstruct,
        ahead=config.ahead, kl=config.kl,
    )  # fmt: skip


@dataclass
class Latent:
    """Learned tensors of one matrix: V, scales and offsets. The rest stays as `rounded` has it.

    `groups` says which columns share a scale, and which column of the matrix each column here is. `free_G`: groups that
    learn an offset of their own. `zero_OG`: code of zero of the others, 0 for free ones. Affine groups learn it: the
    nearest whole code is stored. Where `keep_OI` is false, V stays zero, and so does the weight.
    """

    rounded: Rounded
    groups: ColumnGroups
    free_G: Tensor
    affine: bool
    weight_OI: Tensor
    scale_OG: Tensor
    offset_OG: Tensor
    zero_OG: Tensor
    keep_OI: Tensor | None = None

    @classmethod
    def start(cls, rounded: Rounded, weight_OI: Tensor, order_I: Tensor, keep_OI: Tensor | None = None) -> "Latent":
        """Start from the codes of `rounded` and the dense weights, columns in the order `order_I`.

        A mask needs grids with a code of zero.
        """
        groups, device = rounded.groups, weight_OI.device
        bounds = [group.start for group in groups] + [groups[-1].end]
        tops_G = torch.tensor([2.0**group.bits - 1 for group in groups], device=device)
        free_G = torch.tensor([group.grid == "free" for group in groups], device=device)
        zero_OG = torch.where(free_G, 0.0, -rounded.offset_OG / rounded.scale_OG)
        group_I = rounded.grid.group_I.long()
        values_OI, scale_OI = rounded.values_OI, rounded.scale_OG[:, group_I]
        # The outer cells have no outer wall; one step is far enough to be sure.
        down_OI = torch.where(rounded.code_OI == 0, 1.0, CELL_FRAC) * scale_OI
        up_OI = torch.where(rounded.code_OI == rounded.grid.top_I, 1.0, CELL_FRAC) * scale_OI
        latent_OI = torch.minimum(torch.maximum(weight_OI, values_OI - down_OI), values_OI + up_OI)
        if keep_OI is not None:
            latent_OI *= keep_OI
        column_groups = ColumnGroups(
            tuple(bounds), torch.tensor(bounds, dtype=torch.int32, device=device), tops_G, order_I
        )
        scale_OG, offset_OG = rounded.scale_OG.clone(), rounded.offset_OG.clone()
        affine = all(group.grid == "affine" for group in groups)
        return cls(rounded, column_groups, free_G, affine, latent_OI, scale_OG, offset_OG, zero_OG, keep_OI)

    @property
    def size(self) -> float:
        """Return what the rate of V is a share of: the step between levels on `EVEN` grids, else the RMS of V."""
        even = all(group.grid in EVEN for group in self.rounded.groups)
        tensor = self.scale_OG if even else self.weight_OI
        return float(tensor.square().mean().sqrt())

    def levels(self) -> Levels:
        """Return scales and offsets as they would be stored now."""
        scale_OG = self.scale_OG.to(SCALE_DTYPE).float().clamp_min(SMALLEST_SCALE)
        zero_OG = self.zero_OG
        if self.affine:
            zero_OG = torch.minimum(zero_OG.round().clamp_min(0), self.groups.tops_G)
        offset_OG = torch.where(self.free_G, self.offset_OG.to(SCALE_DTYPE).float(), -zero_OG * scale_OG)
        return Levels(self.groups, scale_OG, offset_OG)

    def current(self) -> Rounded:
        """Return the present codes and scales."""
        levels = self.levels()
        code_OI = codes_of(self.weight_OI, levels).to(torch.uint8)
        return replace(self.rounded, code_OI=code_OI, scale_OG=levels.scale_OG, offset_OG=levels.offset_OG)

    def set_gradients(self, gradient_OI: Tensor, levels: Levels) -> None:
        """Set the gradients of V, scales and offsets from that of the matrix."""
        by_latent_OI, by_code_OG, by_one_OG = gradients_of(self.weight_OI, levels, gradient_OI)
        self.weight_OI.grad = by_latent_OI if self.keep_OI is None else by_latent_OI * self.keep_OI
        fixed_OG = torch.where(self.free_G, 0.0, levels.offset_OG / levels.scale_OG)
        self.scale_OG.grad = by_code_OG + fixed_OG * by_one_OG
        self.offset_OG.grad = by_one_OG * self.free_G
        if self.affine:
            self.zero_OG.grad = self._zero_gradients(levels, gradient_OI)

    def _zero_gradients(self, levels: Levels, gradient_OI: Tensor) -> Tensor:
        """Return the gradients of the zero codes [O, G].

        A step of the zero code moves the range, so it changes the weights at its ends only, each by one scale.
        """
        rows, groups = self.zero_OG.shape
        exact_OGC = self.weight_OI.view(rows, groups, -1) - levels.offset_OG[:, :, None]
        exact_OGC /= levels.scale_OG[:, :, None]
        outside_OGC = (exact_OGC < -0.5) | (exact_OGC > self.groups.tops_G[:, None] + 0.5)
        gradient_OGC = gradient_OI[:, self.groups.order_I].view(rows, groups, -1).float()
        return -(gradient_OGC * outside_OGC).sum(2) * levels.scale_OG


def learn(
    task: Reconstruction,
    start: Mapping[str, Latent],
    schedule: Schedule,
    generator: torch.Generator,
) -> tuple[dict[str, Rounded], BestState]:
    """Learn, and return the codes with the lowest held-out error; the start, if learning never lowered it."""
    groups: list[dict[str, Any]] = []
    for latent in start.values():
        scale = float(latent.scale_OG.square().mean().sqrt())
        groups.append({"params": [latent.weight_OI], "size": latent.size})
        groups.append({"params": [latent.scale_OG, latent.offset_OG], "size": scale * SCALE_RATE})
        if latent.affine:
            groups.append({"params": [latent.zero_OG], "size": 1.0})
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
