"""Layers that leave out the small inputs of every token.

At every token after the prompt an input is left out if its size is at most the threshold of its place. It is known
before the product, so nothing is predicted, and every token has inputs of its own.

The weights of a place lie side by side with the inputs along the rows. So an input that is left out leaves one run of
memory unread. The layers of the model are views of this memory, and prompts still run on all weights.

`TokenContextual` is the handle of `sparsity` with these units. Nothing is predicted or copied: the thresholds hold for
all prompts. Heads stay in the cache, and every sequence of a batch has inputs of its own. A batch runs dense if it has
more than `MAX_TOKENS` sequences, since nearly every input is then needed by one of them.

Legend: P places, N tokens, I inputs and O outputs of the matrices of a place together.

    skipping = InputSkipping(blocks, shadow.places, shadow.limits)
    with skipping.active().applied(): model(input_ids=token)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import ArchitectureError
from niwaki.kernels.inputs import inputs_dot
from niwaki.kernels.types import MAX_TOKENS
from niwaki.runtime.contextual.compact import CompactBlocks, Swap
from niwaki.runtime.contextual.places import Place, skipped_frac
from niwaki.runtime.contextual.predictor_files import InputShadow
from niwaki.runtime.contextual.prefill import Prefill
from niwaki.runtime.contextual.sequence import ActiveUnits, ContextualSequence, Decision, Record
from niwaki.runtime.contextual.sparsity import Contextual


class SharedProduct:
    """Product of the matrices of a place, computed when the first of them gets the input and handed out in parts.

    `kept_2P` counts the inputs that were read at every place, and the tokens there.
    """

    def __init__(
        self, weight_IO: Tensor, bias_O: Tensor | None, parts: int, limit: Tensor, kept_2P: Tensor, place: int
    ) -> None:
        self.weight_IO, self.bias_O, self.parts, self.limit = weight_IO, bias_O, parts, limit
        self._zero_1 = torch.zeros_like(limit[:1])
        self.kept_2P, self.place = kept_2P, place
        self._x: Tensor | None = None
        self._y_NO: Tensor | None = None
        self._left = 0

    def columns(self, x: Tensor, columns: slice) -> Tensor:
        """Return the columns of the product that belong to one matrix, in the shape of `x`."""
        if self._x is None or not _same(x, self._x):
            self._x, self._y_NO, self._left = x, self._multiply(x.reshape(-1, x.shape[-1])), self.parts
        assert self._y_NO is not None
        y = self._y_NO[:, columns].reshape(*x.shape[:-1], -1)
        self._left -= 1
        if not self._left:
            self._x = self._y_NO = None
        return y

    def _multiply(self, x_NI: Tensor) -> Tensor:
        self.kept_2P[1, self.place] += len(x_NI)
        count_1 = self.kept_2P[0, self.place : self.place + 1]
        if len(self.limit) == 1:
            return inputs_dot(x_NI, self.weight_IO, self.limit, self.bias_O, count=count_1)
        large_NI = torch.where(x_NI.abs() <= self.limit, 0, x_NI)  # every input has a limit of its own
        return inputs_dot(large_NI, self.weight_IO, self._zero_1, self.bias_O, count=count_1)


def _same(x: Tensor, other: Tensor) -> bool:
    """Return True for the same memory: models hand views of one input to their layers."""
    return x is other or (x.data_ptr() == other.data_ptr() and x.shape == other.shape and x.dtype == other.dtype)


class InputSkippingLinear(nn.Module):
    """Linear layer that takes its part of a shared product; other code may read its weight."""

    def __init__(self, product: SharedProduct, columns: slice, full: nn.Module) -> None:
        super().__init__()
        self.product, self.columns = product, columns
        self.weight, self.bias = full.weight, full.bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., I] → [..., O]."""
        return self.product.columns(x, self.columns)


class SkippedInputs(CompactBlocks):
    """Layers that skip inputs by thresholds, for the tokens after one prompt."""

    def __init__(self, swaps: list[Swap], skipping: "InputSkipping") -> None:
        super().__init__(swaps)
        self.skipping = skipping
        self._read = self._tokens = [0] * len(skipping.places)

    @property
    def addresses(self) -> tuple[tuple[int, ...], ...]:
        """Return the address of the weights: a recorded graph reads it, and the thresholds beside it."""
        return ((self.skipping.address,),)

    def start_account(self) -> None:
        """Count from the next token on."""
        self.skipping.take_counts()

    def account(self, record: Record) -> None:
        """Write the share of the weights that was not read since the choice as the last `skipped_frac`."""
        kept_P, tokens_P = self.skipping.take_counts()
        places = self.skipping.places
        self._read = [sum(pair) for pair in zip(self._read, kept_P, strict=True)]
        self._tokens = [sum(pair) for pair in zip(self._tokens, tokens_P, strict=True)]
        counted = zip(self._read, self._tokens, places, strict=True)
        shares = [1 - kept / (tokens * place.inputs) if tokens else 0.0 for kept, tokens, place in counted]
        if any(self._tokens):
            record.skipped_frac[-1:] = [skipped_frac(places, shares)]


class InputSkipping:
    """Weights of all places with the inputs along the rows, their thresholds, and the layers that use both.

    The layers of the model become views of these weights.
    """

    def __init__(self, blocks: nn.ModuleList, places: Sequence[Place], limits: Sequence[Tensor]) -> None:
        self.places = places
        device = next(blocks.parameters()).device
        self.limits = [limit.to(device) for limit in limits]
        self.kept_2P = torch.zeros(2, len(places), dtype=torch.int64, device=device)
        self._first = blocks[places[0].block].get_submodule(places[0].names[0])
        self._swaps = [swap for index in range(len(places)) for swap in self._place(blocks, index)]
        self.address = self._first_address()

    def active(self) -> SkippedInputs:
        """Return the layers for the tokens after one prompt."""
        self.kept_2P.zero_()
        return SkippedInputs(self._swaps, self)

    @property
    def stale(self) -> bool:
        """Return True if the layers of the model have other memory by now: it moved, or got another dtype."""
        return self._first_address() != self.address

    def _first_address(self) -> int:
        return input_major(self._first).data_ptr()

    def take_counts(self) -> tuple[list[int], list[int]]:
        """Return the inputs read at every place, and the tokens there, since the last call."""
        kept_P, tokens_P = self.kept_2P.tolist()
        self.kept_2P.zero_()
        return kept_P, tokens_P

    @torch.no_grad()
    def _place(self, blocks: nn.ModuleList, index: int) -> list[Swap]:
        place = self.places[index]
        block = blocks[place.block]
        layers = [block.get_submodule(name) for name in place.names]
        views_IO = [input_major(layer) for layer in layers]
        weight_IO = torch.cat(views_IO, dim=1)
        bias_O, limit = _joined_bias(layers, views_IO), self.limits[index]
        product = SharedProduct(weight_IO, bias_O, len(layers), limit, self.kept_2P, index)
        swaps, first = [], 0
        for name, layer, view_IO in zip(place.names, layers, views_IO, strict=True):
            columns = slice(first, first := first + view_IO.shape[1])
            own_IO = weight_IO[:, columns]
            layer.weight = nn.Parameter(own_IO.t() if isinstance(layer, nn.Linear) else own_IO, requires_grad=False)
            layer.register_state_dict_post_hook(_contiguous)
            owner, _, leaf = name.rpartition(".")
            swaps.append(Swap(block.get_submodule(owner), leaf, InputSkippingLinear(product, columns, layer)))
        return swaps


def _joined_bias(layers: Sequence[nn.Module], views_IO: Sequence[Tensor]) -> Tensor | None:
    """Return the biases of the layers side by side, zero for those without one; None if none has one."""
    biases = [getattr(layer, "bias", None) for layer in layers]
    if not any(isinstance(bias, Tensor) for bias in biases):
        return None
    pairs = zip(biases, views_IO, strict=True)
    return torch.cat([view.new_zeros(view.shape[1]) if bias is None else bias.detach() for bias, view in pairs])


def _contiguous(layer: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Copy the weight for a state dict: views of one memory cannot be saved."""
    state[f"{prefix}weight"] = state[f"{prefix}weight"].detach().clone(memory_format=torch.contiguous_format)


def input_major(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer as a view [I, O]. Raises ArchitectureError for another layer."""
    from transformers.pytorch_utils import Conv1D

    weight: Any = layer.weight
    if isinstance(layer, nn.Linear):
        return weight.detach().t()  # type: ignore[no-any-return]
    if isinstance(layer, Conv1D):
        return weight.detach()  # type: ignore[no-any-return]
    raise ArchitectureError(f"{type(layer).__name__}: inputs are skipped in plain linear layers only")


def check_places(blocks: nn.ModuleList, places: Sequence[Place]) -> None:
    """Raise ArchitectureError if a place is not one of these blocks."""
    for place in places:
        known = dict(blocks[place.block].named_modules()) if place.block < len(blocks) else {}
        if missing := next((name for name in place.names if name not in known), None):
            raise ArchitectureError(f"the thresholds name {missing} of block {place.block}, which this model lacks")
        shapes = [input_major(known[name]).shape for name in place.names]
        if {inputs for inputs, _ in shapes} != {place.inputs} or sum(outputs for _, outputs in shapes) != place.outputs:
            raise ArchitectureError(
                f"{place.kind} of block {place.block} has other sizes than the thresholds say: compress the model again"
            )


class InputStatistics(Prefill):
    """Share of the inputs of a prompt that lie below the threshold of their place, by sequence and place."""

    def __init__(self, places: Sequence[Place], limits: Sequence[Tensor]) -> None:
        super().__init__()
        self.places, self.limits = places, limits
        self._small: dict[int, Tensor] = {}

    @contextmanager
    def observe(self, blocks: nn.ModuleList, real_BT: Tensor) -> Iterator[None]:
        """Add the dense forwards inside; `real_BT` is true for tokens that are not padding."""
        handles = [
            blocks[place.block]
            .get_submodule(place.names[0])
            .register_forward_pre_hook(lambda _, args, index=index: self._add(index, args[0], real_BT))
            for index, place in enumerate(self.places)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._count(real_BT)

    def _add(self, index: int, x: Tensor, real_BT: Tensor) -> None:
        if x.numel() != real_BT.numel() * x.shape[-1]:
            return  # a matrix of something else than the tokens
        small_BT = (x.abs() <= self.limits[index]).view(*real_BT.shape, -1).float().mean(2)
        small_B = (small_BT * real_BT).sum(1)
        self._small[index] = self._small[index] + small_B if index in self._small else small_B

    def deviation(self, shares: Sequence[float]) -> float:
        """Return the mean distance of the shares from the expected ones, weighed by weights; of the furthest prompt."""
        assert self.tokens_B is not None and self._small, "no forward was observed"
        device, seen = self.limits[0].device, sorted(self._small)
        share_BP = torch.stack([self._small[index] for index in seen], dim=1) / self.tokens_B[:, None]
        expected_P = torch.tensor([shares[index] for index in seen], device=device)
        weight_P = torch.tensor([self.places[index].weights for index in seen], device=device, dtype=torch.float32)
        return float(((share_BP - expected_P).abs() @ (weight_P / weight_P.sum())).max())


class TokenContextual(Contextual):
    """Handle of a model that skips inputs by thresholds, made by `attach`."""

    shadow: InputShadow

    def __init__(self, model: Any, shadow: InputShadow) -> None:
        super().__init__(model, shadow)
        self.skipping = InputSkipping(self.blocks, shadow.places, shadow.limits)

    def _statistics(self) -> Prefill:
        if self.skipping.stale:
            self.skipping = InputSkipping(self.blocks, self.shadow.places, self.shadow.limits)
        return InputStatistics(self.shadow.places, self.skipping.limits)

    def _choose(self, sequence: ContextualSequence, in_place: bool | None) -> ActiveUnits | None:
        record, tokens_B = sequence.record, sequence.prefill.tokens_B
        if tokens_B is None or int(tokens_B.min()) < self.shadow.running.min_prompt:
            return None  # the next token asks again
        if len(tokens_B) > MAX_TOKENS:
            because = f"a batch of {len(tokens_B)} sequences: inputs are skipped for at most {MAX_TOKENS}"
            sequence.run_dense(Decision.BATCH, because)
            return None
        assert isinstance(sequence.prefill, InputStatistics)
        deviation, limit = sequence.prefill.deviation(self.shadow.shares), self.shadow.running.max_deviation
        record.deviation.append(deviation)
        if limit and deviation > limit:
            because = f"the shares of small inputs in the prompt are {deviation:.3g} from what is expected"
            sequence.run_dense(Decision.DEVIATION, because)
            return None
        record.skipped_frac.append(self.shadow.skip_frac)
        record.decision = Decision.SPARSE
        return ActiveUnits(self.skipping.active(), None)
