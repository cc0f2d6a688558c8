"""Learning inside one block: gradients through this block alone pull its output back to the dense one.

Shared by every method that learns (Wanda++'s regional optimisation, BESA's sparsity rates). The model around
the block never takes part, so the memory is that of one block whatever the depth.

The error of a token is ‖y − t‖² / ‖t‖², averaged over tokens: a few tokens with massive activations would
otherwise be all that is learned from. An eighth of the windows is held out and decides which state is kept.

Legend: O outputs, I inputs, B windows, T tokens, D hidden size.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from niwaki.data.statistics import Needs
from niwaki.data.stream import CalibrationData
from niwaki.methods.cost import Scope, Work, learning
from niwaki.methods.shared.best_state import BestState, cosine
from niwaki.model.anatomy import Call
from niwaki.model.decoder import Block

TARGETS = ("block", "dense", "both")
CHECKS = 5  # held-out measurements of a descent at most; with a cosine schedule the last is nearly always the best
OPTIMIZERS = ("adam", "rmsprop")
Matrices = Mapping[str, Tensor]
LearningTarget = Annotated[
    str,
    "Output to learn: that of the dense block on the same inputs (block), "
    "that in the dense model (dense), or the mean of both (both).",
]
Found = TypeVar("Found")


class Reconstruction:
    """The task of one block: inputs, wanted outputs, and gradients of the error between.

    `target` is what the output is pulled to: `block` (the dense block on the same inputs), `dense` (the block's
    output in the dense model) or `both` (their mean).
    """

    def __init__(self, block: Block, calib: CalibrationData, target: str, generator: torch.Generator) -> None:
        assert calib.stream is not None and calib.stream.outputs is not None, "needs() must ask for windows"
        self.block = block
        self.stream = calib.stream
        self.outputs = calib.stream.outputs
        self.dense = calib.dense if target != "block" else None
        self.target = target
        order = torch.randperm(len(calib.stream), generator=generator).tolist()
        count = len(order) // 8
        self.held, self.train = order[:count] or order, order[count:]

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        """`count` training windows in random order, none a second time before all had their turn."""
        drawn: list[int] = []
        while len(drawn) < count:
            drawn += [self.train[i] for i in torch.randperm(len(self.train), generator=generator).tolist()]
        return drawn[:count]

    def error(self, matrices: Matrices) -> float:
        """Mean relative error of the held-out tokens with `matrices` {name: [O, I]} in place."""
        parameters = assemble(self.block, matrices)
        total = torch.zeros((), dtype=torch.float64, device=next(iter(matrices.values())).device)
        with torch.no_grad():
            for window in self.held:
                total += self._error(parameters, [window]).double().mean()
        return float(total) / len(self.held)

    def gradients(self, matrices: Matrices, windows: list[int]) -> dict[str, Tensor]:
        """Gradient [O, I] of the summed token errors of `windows`, by matrix, in the block's dtype.

        Summed, not averaged: float16 would lose the gradients of a mean.
        """
        parameters = assemble(self.block, matrices)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        return deterministically(
            lambda: gradients_of(self.block, self._error(parameters, windows).sum(), parameters, matrices)
        )

    def _error(self, parameters: dict[str, Tensor], windows: list[int]) -> Tensor:
        y_BTD = run_with(self.block, parameters, self._call(len(windows)), self.stream.hidden.take(windows))
        t_BTD = self._wanted(windows)
        return (y_BTD.float() - t_BTD).square().sum(-1) / t_BTD.square().sum(-1).clamp_min(1e-12)

    def _call(self, count: int) -> Call:
        return self.stream.call(count, self.block.index)

    def _wanted(self, windows: list[int]) -> Tensor:
        if self.dense is None:
            return self.outputs.take(windows).float()
        dense_BTD = self.dense.hidden.take(windows).float()
        return dense_BTD if self.target == "dense" else (dense_BTD + self.outputs.take(windows).float()) / 2


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How far to descend: `rounds` of `samples` windows, `batch` at a time, steps of `rate_frac` · RMS(W).

    `optimizer`: `rmsprop`, or `adam`, whose momentum averages the noise of small batches.
    """

    rounds: int
    samples: int
    batch: int
    rate_frac: float
    optimizer: str = "rmsprop"

    def rate(self, step: int, steps: int) -> float:
        """Cosine to zero after a warm-up, which RMSprop needs: its first steps are up to ten times too long."""
        warm_up = min(1.0, (step + 1) / (0.1 * steps + 1))
        return self.rate_frac * warm_up * cosine(step, steps)

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """With the rate of every group still to be set."""
        if self.optimizer == "adam":
            on_gpu = groups[0]["params"][0].is_cuda
            return torch.optim.Adam(groups, betas=(0.9, 0.95), fused=on_gpu)
        return torch.optim.RMSprop(groups)


# Masters {matrix: [O, I]} in, keep masks out: how the pruned weights are chosen again before each round.
Prune = Callable[[Matrices], Matrices]


def descend(
    task: Reconstruction,
    start: dict[str, Tensor],
    keep: Matrices,
    schedule: Schedule,
    generator: torch.Generator,
    prune: Prune | None = None,
) -> tuple[dict[str, Tensor], BestState]:
    """Gradient descent on float32 masters; returns the weights and their held-out errors.

    `start` is emptied: a master takes the place of every weight. Masked weights stay zero; with `prune` they may move
    instead and every round chooses again. The state with the lowest held-out error of all checks is returned: the
    start itself, if learning never lowered it.
    """
    masters = {name: (start.pop(name) * keep[name]).requires_grad_(False) for name in list(start)}
    sizes = {name: float(weight_OI.square().mean().sqrt()) for name, weight_OI in masters.items()}
    optimizer = schedule.make_optimizer([{"params": [masters[name]], "size": sizes[name]} for name in masters])
    lowest = BestState(list(masters.values()), task.error(masters))

    def choose_again() -> None:
        if prune is not None:
            chosen = prune(masters)
            for name, master_OI in masters.items():
                master_OI.mul_(chosen[name])

    def check() -> None:
        lowest.offer(task.error(masters))

    for windows in follow(task, schedule, optimizer, generator, choose_again, check):
        gradients = task.gradients(masters, windows)
        for name, master_OI in masters.items():
            master_OI.grad = _masked(gradients.pop(name), None if prune else keep[name])
    lowest.restore()
    return masters, lowest


def follow(
    task: Reconstruction,
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    end_round: Callable[[], None],
    check: Callable[[], None],
) -> Iterator[list[int]]:
    """The windows of every step of `schedule`; the caller sets their gradients, then the optimizer takes the step.

    Each parameter group steps in proportion to its `size`. `end_round` runs after every round, `check` after the last
    one and at most CHECKS times.
    """
    batch = min(schedule.batch, len(task.train))
    per_round = math.ceil(schedule.samples / batch)
    step, steps = 0, schedule.rounds * per_round
    check_every = math.ceil(schedule.rounds / CHECKS)
    for number in range(1, schedule.rounds + 1):
        drawn = task.draw(per_round * batch, generator)
        for first in range(0, len(drawn), batch):
            yield drawn[first : first + batch]
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step, steps) * group["size"]
            optimizer.step()
            optimizer.zero_grad()  # the memory, which the next window's gradients need
            step += 1
        end_round()
        if number % check_every == 0 or number == schedule.rounds:
            check()


def _masked(gradient_OI: Tensor, keep_OI: Tensor | None) -> Tensor:
    """A float32 gradient that is zero where nothing is kept, in one pass."""
    if keep_OI is None:
        return gradient_OI.float()
    return torch.mul(gradient_OI, keep_OI, out=torch.empty_like(gradient_OI, dtype=torch.float32))


def assemble(block: Block, matrices: Matrices) -> dict[str, Tensor]:
    """Parameters of the block's module that hold `matrices`, in its dtype and layout (fused experts stacked).

    A matrix that is such a parameter already is not copied: the two share their memory.
    """
    parameters: dict[str, Tensor] = {}
    for name, weight_OI in matrices.items():
        linear = block.linears[name]
        own = block.module.get_parameter(linear.parameter)
        whole = linear.expert is None and not linear.transposed and own.is_contiguous()
        if whole and weight_OI.dtype == own.dtype and weight_OI.is_contiguous():
            parameters[linear.parameter] = weight_OI.detach()
            continue
        if linear.parameter not in parameters:
            parameters[linear.parameter] = torch.empty_like(own)
        linear.view(parameters[linear.parameter]).copy_(weight_OI)
    return parameters


def gradients_of(block: Block, loss: Tensor, parameters: dict[str, Tensor], names: Matrices) -> dict[str, Tensor]:
    """Gradients of `loss` as [O, I] by matrix; zero for one that took no part (an unreached expert)."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    by_parameter = dict(zip(parameters, found, strict=True))
    return {name: block.linears[name].view(by_parameter[block.linears[name].parameter]) for name in names}


def run_with(block: Block, parameters: dict[str, Tensor], call: Call, x_BTD: Tensor) -> Tensor:
    """The block's output with `parameters` in place of its own, differentiable in them."""
    replaced = {f"module.{name}": parameter for name, parameter in parameters.items()}
    out: Tensor = functional_call(_Called(block.module, call), replaced, (x_BTD,))
    return out


class _Called(nn.Module):
    """A block with the arguments of its call, so that functional_call can reach its parameters."""

    def __init__(self, module: nn.Module, call: Call) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.call(self.module, x_BTD)


def deterministically(work: Callable[[], Found]) -> Found:
    """Same seed, same bytes: attention's backward adds in any order on CUDA unless told not to.

    An operation that has no deterministic form runs as it is, after a warning by torch that names it.
    """
    try:
        with _deterministic(warn_only=False):
            return work()
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
    with _deterministic(warn_only=True):
        return work()


@contextlib.contextmanager
def _deterministic(*, warn_only: bool) -> Iterator[None]:
    """Merely warned, torch keeps attention that adds in any order; cuDNN's cannot be told, so it is left out."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for, else it refuses
    before = torch.are_deterministic_algorithms_enabled()
    before_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch.use_deterministic_algorithms(before, warn_only=before_warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def learning_needs(batch: int, target: str) -> Needs:
    """Norms to rank by, windows to learn from, and the dense stream if the target asks for it."""
    return Needs(sqnorm=True, learn_batches=frozenset({1, batch}), dense=target != "block")


def learning_cost(
    scope: Scope, rounds: int, samples: int, batch: int, *, copies: float = 3.5, passes: float = 14
) -> Work:
    """What `follow` and its checks do to one block (see `costs.learning`); nothing without rounds."""
    if not rounds:
        return Work()
    held = scope.windows // 8 or scope.windows
    batch = min(batch, max(1, scope.windows - held))
    checks = min(CHECKS, rounds)
    return learning(scope, rounds * math.ceil(samples / batch), batch, checks=checks, copies=copies, passes=passes)


def check_choices(target: str, optimizer: str = "adam") -> None:
    """Raises ValueError unless these name something to learn towards, and a way to do it."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
