"""Learning inside one block: gradients through this block alone pull its output back to the dense one.

All learning methods use it: Wanda++'s regional optimization, COMP, PTQ1.61, learned rounding, and BESA for its
gradients. The model around the block never takes part, so the memory is that of one block at any depth.

The error of a token is ‖y − t‖² / ‖t‖², averaged over tokens. Without the division, a few tokens with massive
activations would dominate the loss. An eighth of the windows is held out and decides which state is kept, or windows
of another text do (`CalibrationData.held`).

`ahead` following blocks, dense, count with their outputs. Where these reach the last block, `kl` adds the divergence of
the logits from those of the dense model (`divergence`).

`normalize` divides the squared error otherwise: `channel` by the energy of each output channel in the batch, `released`
by its root, as the released code of BESA does. Both are means over channels. Held-out errors stay those of tokens.

`reconstruct=parts` matches attention and MLP apart (arXiv 2510.14444, by its abstract). The matrices of attention learn
the dense output of attention on the same inputs. The other matrices learn the output of the block, on what attention
puts out now. `both` adds the two errors.

    for batch in training_batches(task, schedule, generator):
        ...                                       # set the gradients for batch.windows
        take_step(optimizer, batch.rate)
        if batch.measure:
            best.offer(...)                       # the held-out error

Legend: O outputs, I inputs, B windows, T tokens, D hidden size.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from niwaki.data.stream import CalibrationData, Stream
from niwaki.errors import ArchitectureError
from niwaki.methods.shared.best_state import BestState, cosine
from niwaki.methods.shared.determinism import fast_products, run_deterministically
from niwaki.methods.shared.divergence import logit_divergences
from niwaki.methods.shared.learning_options import MAX_CHECKS, LearningConfig
from niwaki.model.block_calls import Call
from niwaki.model.decoder import Block

Matrices = Mapping[str, Tensor]


class _Text(NamedTuple):
    """Hidden states of windows in the compressed model, and in the dense model if they are needed."""

    stream: Stream
    dense: Stream | None


class Reconstruction:
    """Task of one block: inputs, target outputs, and gradients of the error between output and target.

    `target` is the output to learn: `block`, that of the dense block on the same inputs; `dense`, that of the block in
    the dense model; or `both`, their mean. With `reconstruct` parts or both, the gradients of attention come from its
    own output. `normalize`: what divides the squared error that is learned. `kl`: the weight of the divergence of the
    logits. Raises ArchitectureError if the block has no attention apart from the rest.
    """

    def __init__(
        self,
        block: Block,
        calib: CalibrationData,
        target: str,
        generator: torch.Generator,
        reconstruct: str = "block",
        normalize: str = "token",
        ahead: int = 0,
        kl: float = 0.0,
    ) -> None:
        assert calib.stream is not None and calib.stream.outputs is not None, "needs() must ask for windows"
        self.block = block
        self.stream = calib.stream
        self.outputs = calib.stream.outputs
        self.text = _Text(calib.stream, calib.dense)
        self.judge = self.text if calib.held is None else _Text(calib.held.stream, calib.held.dense)
        self.target = target
        self.reconstruct = reconstruct
        self.normalize = normalize
        self.following = block.following[:ahead]
        self.writer = "" if reconstruct == "block" else attention_writer(block, self.outputs.store_STD.shape[-1])
        last = self.following[-1] if self.following else block
        self.kl = kl if kl and last.index == len(self.stream.decoder) - 1 else 0.0
        order = torch.randperm(len(calib.stream), generator=generator).tolist()
        if calib.held is not None:
            self.held, self.train = list(range(len(calib.held.stream))), order
            return
        count = len(order) // 8
        self.held, self.train = order[:count] or order, order[count:]

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        """Draw `count` training windows at random; each comes once before any comes again."""
        drawn: list[int] = []
        while len(drawn) < count:
            drawn += [self.train[i] for i in torch.randperm(len(self.train), generator=generator).tolist()]
        return drawn[:count]

    def error(self, matrices: Matrices) -> float:
        """Return the mean relative error of the held-out tokens with `matrices` {name: [O, I]} in place."""
        parameters = assemble(self.block, matrices)
        total = torch.zeros((), dtype=torch.float64, device=next(iter(matrices.values())).device)
        with torch.no_grad():
            for window in self.held:
                total += self._token_errors(parameters, [window], self.judge).double().mean()
        return float(total) / len(self.held)

    def gradients(self, matrices: Matrices, windows: list[int]) -> dict[str, Tensor]:
        """Return the gradient [O, I] of the summed token errors of `windows`, by matrix, in the block's dtype.

        The errors are summed, not averaged: float16 would lose the gradients of a mean.
        """
        parameters = assemble(self.block, matrices)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with fast_products():
            if self.writer:
                return run_deterministically(lambda: self._gradients_by_part(parameters, windows, matrices))
            return run_deterministically(
                lambda: gradients_of(self.block, self._loss(parameters, windows), parameters, matrices)
            )

    def _gradients_by_part(
        self, parameters: dict[str, Tensor], windows: list[int], names: Matrices
    ) -> dict[str, Tensor]:
        """Return the gradients of attention's own error for all that it depends on, and of the block's for the rest."""
        call, x_BTD = self.stream.call(windows, self.block.index), self.stream.hidden.take(windows)
        wanted_BTD = _dense_output(self.block, self.writer, call, x_BTD)
        with _captured(self.block, self.writer) as found:
            y_BTD = run_with(self.block, parameters, call, x_BTD)
        of_attention = relative_errors(found[0], wanted_BTD.float()).sum()
        of_block = self._errors_of(y_BTD, windows, self.text).sum()
        own = torch.autograd.grad(of_attention, list(parameters.values()), retain_graph=True, allow_unused=True)
        gradients = {name: gradient for name, gradient in zip(parameters, own, strict=True) if gradient is not None}
        left = {name: p for name, p in parameters.items() if self.reconstruct == "both" or name not in gradients}
        others = torch.autograd.grad(of_block, list(left.values()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(left, others, strict=True):
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
        return by_matrix(self.block, gradients, names)

    def _loss(self, parameters: dict[str, Tensor], windows: list[int]) -> Tensor:
        """Return the error that is learned, times the number of tokens."""
        if self.normalize == "token":
            return self._token_errors(parameters, windows, self.text).sum()
        y_BTD, t_BTD = self._outputs(parameters, windows, self.text), self._target_outputs(windows, self.text)
        return channel_error(y_BTD, t_BTD, 1.0 if self.normalize == "channel" else 0.5) * t_BTD[..., 0].numel()

    def _token_errors(self, parameters: dict[str, Tensor], windows: list[int], text: "_Text") -> Tensor:
        """Return the error of every token [B, T] of windows of `text`."""
        return self._errors_of(self._outputs(parameters, windows, text), windows, text)

    def _errors_of(self, y_BTD: Tensor, windows: list[int], text: "_Text") -> Tensor:
        """Return ‖y − t‖² / ‖t‖² of every token [B, T], the mean over the outputs of this block and the following.

        Add the divergence of the logits that they end in, if it counts.
        """
        t_BTD = self._target_outputs(windows, text)
        errors_BT = relative_errors(y_BTD, t_BTD)
        for block in self.following:
            call = text.stream.call(windows, block.index)
            y_BTD = call(block.module, y_BTD)
            with torch.no_grad():
                t_BTD = call(block.module, t_BTD.to(y_BTD.dtype)).float()
            errors_BT = errors_BT + relative_errors(y_BTD, t_BTD)
        errors_BT = errors_BT / (1 + len(self.following))
        if self.kl:
            found_BT = self._divergences(y_BTD, windows, text)
            errors_BT = errors_BT + self.kl * found_BT.view(*found_BT.shape, *[1] * (errors_BT.dim() - 2))
        return errors_BT

    def _divergences(self, y_BTD: Tensor, windows: list[int], text: "_Text") -> Tensor:
        """Return the divergence of the logits of `y_BTD`, after the last block, from those of the dense model."""
        assert text.dense is not None, "needs() must ask for the dense stream"
        dense_BTD = text.dense.hidden.take(windows)
        with torch.no_grad():
            for block in self.following:
                dense_BTD = text.dense.call(windows, block.index)(block.module, dense_BTD)
        ids_BT = text.stream.ids_ST[windows]
        return logit_divergences(text.stream.decoder, text.dense.decoder, ids_BT, y_BTD, dense_BTD)

    def _outputs(self, parameters: dict[str, Tensor], windows: list[int], text: "_Text") -> Tensor:
        call = text.stream.call(windows, self.block.index)
        return run_with(self.block, parameters, call, text.stream.hidden.take(windows))

    def _target_outputs(self, windows: list[int], text: "_Text") -> Tensor:
        """Return the outputs [B, T, D] to learn."""
        assert text.stream.outputs is not None, "needs() must ask for windows"
        if self.target == "block" or text.dense is None:
            return text.stream.outputs.take(windows).float()
        dense_BTD = text.dense.hidden.take(windows).float()
        return dense_BTD if self.target == "dense" else (dense_BTD + text.stream.outputs.take(windows).float()) / 2


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length of the training: `rounds` of `samples` windows, `batch` at a time, steps of `rate_frac` · RMS(W).

    `optimizer`: `rmsprop`, or `adam`, whose momentum averages the noise of small batches.
    """

    rounds: int
    samples: int
    batch: int
    rate_frac: float
    optimizer: str = "rmsprop"

    @classmethod
    def of(cls, config: LearningConfig, rounds: int, optimizer: str = "adam") -> "Schedule":
        """Make the schedule for the options of a method."""
        return cls(
            rounds=rounds,
            samples=config.samples,
            batch=config.batch,
            rate_frac=config.rate_frac,
            optimizer=optimizer,
        )

    def rate(self, step: int, steps: int) -> float:
        """Return the rate of a step: a cosine to zero after a warm-up.

        RMSprop needs the warm-up, because its first steps are up to ten times too long.
        """
        warm_up = min(1.0, (step + 1) / (0.1 * steps + 1))
        return self.rate_frac * warm_up * cosine(step, steps)

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make the optimizer of these parameter groups; `take_step` sets their rates."""
        if self.optimizer == "adam":
            on_gpu = groups[0]["params"][0].is_cuda
            return torch.optim.Adam(groups, betas=(0.9, 0.95), fused=on_gpu)
        return torch.optim.RMSprop(groups)


class TrainingBatch(NamedTuple):
    """Windows of one step, its rate, and what is due after it: the end of a round, a held-out measurement."""

    windows: list[int]
    rate: float
    ends_round: bool
    measure: bool


def training_batches(task: Reconstruction, schedule: Schedule, generator: torch.Generator) -> Iterator[TrainingBatch]:
    """Yield the batches of every round of `schedule`; every round draws its windows when it begins.

    A measurement is due after the last round, and at most MAX_CHECKS times in all.
    """
    batch = min(schedule.batch, len(task.train))
    steps_per_round = math.ceil(schedule.samples / batch)
    steps = schedule.rounds * steps_per_round
    measure_every = math.ceil(schedule.rounds / MAX_CHECKS)
    for number in range(1, schedule.rounds + 1):
        drawn = task.draw(steps_per_round * batch, generator)
        for place in range(steps_per_round):
            step = (number - 1) * steps_per_round + place
            ends_round = place == steps_per_round - 1
            yield TrainingBatch(
                drawn[place * batch : (place + 1) * batch],
                schedule.rate(step, steps),
                ends_round,
                ends_round and (number % measure_every == 0 or number == schedule.rounds),
            )


def take_step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Step every parameter group in proportion to its `size`, then free the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["size"]
    optimizer.step()
    optimizer.zero_grad()  # the gradients of the next windows need this memory


# Master weights {matrix: [O, I]} in, keep masks out: a new choice of the pruned weights after each round.
Prune = Callable[[Matrices], Matrices]


def train_block(
    task: Reconstruction,
    start: dict[str, Tensor],
    keep: Matrices,
    schedule: Schedule,
    generator: torch.Generator,
    prune: Prune | None = None,
) -> tuple[dict[str, Tensor], BestState]:
    """Train the kept weights of a block on float32 masters. Return the weights and their held-out errors.

    `start` is emptied: a master takes the place of every weight. Masked weights stay zero. With `prune` they may move,
    and every round chooses a mask again. The result is the state with the lowest held-out error, or the start if
    learning never lowered it.
    """
    masters = {name: (start.pop(name) * keep[name]).requires_grad_(False) for name in list(start)}
    sizes = {name: float(weight_OI.square().mean().sqrt()) for name, weight_OI in masters.items()}
    optimizer = schedule.make_optimizer([{"params": [masters[name]], "size": sizes[name]} for name in masters])
    best = BestState(list(masters.values()), task.error(masters))
    for batch in training_batches(task, schedule, generator):
        gradients = task.gradients(masters, batch.windows)
        for name, master_OI in masters.items():
            master_OI.grad = _masked(gradients.pop(name), None if prune else keep[name])
        take_step(optimizer, batch.rate)
        if prune is not None and batch.ends_round:
            chosen = prune(masters)
            for name, master_OI in masters.items():
                master_OI.mul_(chosen[name])
        if batch.measure:
            best.offer(task.error(masters))
    best.restore()
    return masters, best


def _masked(gradient_OI: Tensor, keep_OI: Tensor | None) -> Tensor:
    """Return the float32 gradient, zero outside the mask, in one pass."""
    if keep_OI is None:
        return gradient_OI.float()
    return torch.mul(gradient_OI, keep_OI, out=torch.empty_like(gradient_OI, dtype=torch.float32))


def assemble(block: Block, matrices: Matrices) -> dict[str, Tensor]:
    """Return parameters of the block's module that hold `matrices`, in its dtype and layout (fused experts stacked).

    A matrix that has this dtype and layout already is not copied: it shares its memory with the parameter.
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
    """Return the gradients of `loss` as [O, I] by matrix; zero for one that took no part (an unreached expert)."""
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return by_matrix(block, dict(zip(parameters, gradients, strict=True)), names)


def by_matrix(block: Block, by_parameter: Mapping[str, Tensor], names: Matrices) -> dict[str, Tensor]:
    """Return views [O, I] of tensors that have the layout of parameters, by matrix."""
    return {name: block.linears[name].view(by_parameter[block.linears[name].parameter]) for name in names}


def relative_errors(y_BTD: Tensor, t_BTD: Tensor) -> Tensor:
    """Return ‖y − t‖² / ‖t‖² of every token [B, T] in float32."""
    return (y_BTD.float() - t_BTD).square().sum(-1) / t_BTD.square().sum(-1).clamp_min(1e-12)


def channel_error(y_BTD: Tensor, t_BTD: Tensor, power: float) -> Tensor:
    """Return the mean over channels of ‖y − t‖² / (‖t‖²)^power, sums over all tokens, in float32."""
    lost_D = (y_BTD.float() - t_BTD).square().sum((0, 1))
    return (lost_D / t_BTD.square().sum((0, 1)).clamp_min(1e-12) ** power).mean()


def attention_writer(block: Block, width: int) -> str:
    """Return the matrix that writes the output of attention: the first that reads an input alone and puts out D.

    Raises ArchitectureError if there is none before the last matrix.
    """
    *before, _ = block.anatomy.groups.values()
    for members in before:
        if len(members) == 1 and members[0].rows == width and members[0].expert is None:
            return members[0].name
    raise ArchitectureError(
        f"block {block.index} has no attention apart from the rest ({', '.join(block.linears)}): use reconstruct=block"
    )


class _Reached(Exception):  # noqa: N818 (ends a forward, and is not an error)
    """Signal that the matrix whose output is wanted has run."""


@contextlib.contextmanager
def _captured(block: Block, name: str, *, last: bool = False) -> Iterator[list[Tensor]]:
    """Yield a list that receives the output of the matrix `name`; `last` ends the forward there."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found.append(output)
        if last:
            raise _Reached

    hook = block.module.get_submodule(block.linears[name].parameter.rpartition(".")[0]).register_forward_hook(keep)
    try:
        yield found
    except _Reached:
        return
    finally:
        hook.remove()
    if not found:
        raise ArchitectureError(f"block {block.index} uses {name} without a call of its module: use reconstruct=block")


def _dense_output(block: Block, name: str, call: Call, x_BTD: Tensor) -> Tensor:
    """Return the output of the dense matrix `name` in a forward that ends there."""
    with _captured(block, name, last=True) as found, torch.no_grad():
        call(block.module, x_BTD)
    return found[0]


def run_with(block: Block, parameters: dict[str, Tensor], call: Call, x_BTD: Tensor) -> Tensor:
    """Return the block's output with `parameters` in place of its own, differentiable in them."""
    replaced = {f"module.{name}": parameter for name, parameter in parameters.items()}
    out: Tensor = functional_call(_BlockCall(block.module, call), replaced, (x_BTD,))
    return out


class _BlockCall(nn.Module):
    """Module that calls a block with fixed arguments, so that functional_call can replace the block's parameters."""

    def __init__(self, module: nn.Module, call: Call) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.call(self.module, x_BTD)
