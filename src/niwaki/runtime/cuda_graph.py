"""Writing over memory of fixed size, one token of every sequence at a time: on a GPU a step is one CUDA graph.

A step of a small or a sparse model takes less time than Python needs to launch it, so what is skipped would not show.
Here keys and values lie in a static cache, the mask and the positions in tensors that every step moves on by itself,
and the whole forward is recorded once and replayed for every token.

With a contextual model the prompt is read and the units are chosen as ever (`runtime.contextual`); the copies of the
kept units have their fixed place in memory, so that the next sequence fills them anew and the same recording runs on
(`local` masks have the same shapes for all inputs). There is one look, after the prompt: refreshing and checking need a
cache that can be put back, and transformers' `generate`.

Cost: keys and values for `room` tokens from the start; the first sequence of a shape is recorded (three more steps).
Elsewhere than on a GPU the same steps run one by one: right, but no faster than `generate`.

Legend: B sequences, T tokens, V vocabulary, G groups of heads, C channels.

    writer = Graphed(model, room=512)
    ids_BN = writer.write(ids_BT, max_new_tokens=128)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.model.anatomy import find_blocks
from niwaki.runtime.contextual.compact import Compact, Swap, kept_states
from niwaki.runtime.contextual.sparsity import Choice, Contextual

WARM_UP = 2  # steps before the recording, so that libraries have their workspaces


def max_likely(logits_BV: Tensor) -> Tensor:
    """The token [B, 1] with the largest logit."""
    return logits_BV.argmax(-1, keepdim=True)


class Layer:
    """Keys and values of one block in fixed memory; `slot_1` is the place of the next token."""

    def __init__(self, keys_BGTC: Tensor, values_BGTC: Tensor, slot_1: Tensor) -> None:
        self.keys_BGTC, self.values_BGTC, self.slot_1 = keys_BGTC, values_BGTC, slot_1

    def update(self, keys_BG1C: Tensor, values_BG1C: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What attention calls on a cache of transformers."""
        self.keys_BGTC.index_copy_(2, self.slot_1, keys_BG1C)
        self.values_BGTC.index_copy_(2, self.slot_1, values_BG1C)
        return self.keys_BGTC, self.values_BGTC


class Place(nn.Module):
    """Stands for a block and gives it its own layer where the model gives the `cache` of all blocks, whatever the name
    of that argument: so all blocks run the same compiled code.
    """

    def __init__(self, block: nn.Module, cache: Any, layer: Layer) -> None:
        super().__init__()
        self.block, self.cache, self.layer = block, cache, layer

    def __getattr__(self, name: str) -> Any:
        """What models ask their blocks for, such as the kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own."""
        given = {name: self.layer if value is self.cache else value for name, value in kwargs.items()}
        return self.block(*(self.layer if value is self.cache else value for value in args), **given)


@dataclass
class Step:
    """One recorded forward, and the memory that it reads and writes."""

    layers: list[Layer]
    ids_B1: Tensor
    positions_B1: Tensor
    mask_B11T: Tensor
    slot_1: Tensor
    logits_BV: Tensor
    sparse: bool
    forward: Callable[[], None]

    def replay(self, ids_B1: Tensor) -> Tensor:
        """Logits [B, V] behind these tokens; overwritten by the next replay."""
        self.ids_B1.copy_(ids_B1)
        self.forward()
        return self.logits_BV


class Graphed:
    """Writes with one model, dense or contextual, up to `room` tokens a sequence, prompt included.

    `compiled`: the small operations of a block are fused by torch.compile, some ten seconds for each kind of step.
    """

    def __init__(self, model: Any, room: int, *, compiled: bool = False) -> None:
        self.model, self.room, self.compiled = model, room, compiled
        self.contextual: Contextual | None = getattr(model, "contextual", None)
        self._steps: dict[tuple[Any, ...], Step] = {}

    @torch.no_grad()
    def write(
        self,
        ids_BT: Tensor,
        *,
        max_new_tokens: int,
        mask_BT: Tensor | None = None,
        pick: Callable[[Tensor], Tensor] = max_likely,
    ) -> Tensor:
        """The new tokens [B, N] behind prompts that are padded on the left where `mask_BT` is 0."""
        if max_new_tokens < 1 or ids_BT.shape[1] + max_new_tokens > self.room:
            raise InputError(
                f"{ids_BT.shape[1]} tokens and max_new_tokens {max_new_tokens} do not fit in room {self.room}"
            )
        logits_BV, step = self.start(ids_BT, mask_BT)
        written = [pick(logits_BV)]
        while len(written) < max_new_tokens:
            written.append(pick(step.replay(written[-1])))
        if self.contextual is not None and self.contextual.enabled:
            self.contextual.records[-1].count(max_new_tokens - 1, sparse=step.sparse)
        return torch.cat(written, dim=1)

    @torch.no_grad()
    def start(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> tuple[Tensor, Step]:
        """Reads prompts; returns the logits [B, V] behind them, and the step that goes on from there."""
        from transformers import DynamicCache

        real_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT.to(ids_BT)
        cache: Any = DynamicCache(config=self.model.config)
        if any(layer.is_sliding for layer in cache.layers):
            raise InputError("this model attends within a window, which a fixed cache does not follow: use generate")
        positions_BT = (real_BT.cumsum(1) - 1).clamp_min(0)
        output = self.model(
            input_ids=ids_BT, attention_mask=real_BT, position_ids=positions_BT, past_key_values=cache, use_cache=True
        )
        choice = None if self.contextual is None or not self.contextual.enabled else self.contextual.choose()
        states = _states(cache, choice)
        step = self._step(choice, states)
        _fill(step, states, real_BT, positions_BT)
        return output.logits[:, -1], step

    def _step(self, choice: Choice | None, states: list[tuple[Tensor, Tensor]]) -> Step:
        """The recording for this batch and these shapes; one of each kind, dense and sparse, is kept."""
        shapes = () if choice is None else choice.small.places
        key = (choice is None, len(states[0][0]), shapes)
        if key not in self._steps:
            self._steps = {other: step for other, step in self._steps.items() if other[0] != key[0]}
            self._steps[key] = self._record(choice, states)
        return self._steps[key]

    def _record(self, choice: Choice | None, states: list[tuple[Tensor, Tensor]]) -> Step:
        from transformers import DynamicCache

        count, device = len(states[0][0]), states[0][0].device
        ids_B1, positions_B1 = (torch.zeros(count, 1, dtype=torch.int64, device=device) for _ in range(2))
        mask_B11T = torch.zeros(count, 1, 1, self.room, dtype=torch.bool, device=device)
        slot_1 = torch.zeros(1, dtype=torch.int64, device=device)
        layers = []
        for keys, values in states:
            sizes = (*keys.shape[:2], self.room, keys.shape[3]), (*values.shape[:2], self.room, values.shape[3])
            layers.append(Layer(keys.new_zeros(sizes[0]), values.new_zeros(sizes[1]), slot_1))
        rows = self.model.get_output_embeddings().out_features  # a packed head has no weight
        logits_BV = torch.zeros(count, rows, dtype=self.model.dtype, device=device)
        step = Step(layers, ids_B1, positions_B1, mask_B11T, slot_1, logits_BV, choice is not None, lambda: None)
        blocks, cache = find_blocks(self.model)[1], DynamicCache(config=self.model.config)
        places = [Swap(blocks, str(index), Place(block, cache, layers[index])) for index, block in enumerate(blocks)]

        def forward() -> None:
            mask_B11T.index_fill_(3, slot_1, True)
            with (
                nullcontext() if self.contextual is None else self.contextual.applied(choice),
                Compact(places).applied(),
            ):
                output = self.model(
                    input_ids=ids_B1, attention_mask=mask_B11T, position_ids=positions_B1, past_key_values=cache,
                    use_cache=True,
                )  # fmt: skip
            logits_BV.copy_(output.logits[:, -1])
            positions_B1.add_(1)
            slot_1.add_(1)

        if device.type == "cuda":
            with _compiled(blocks) if self.compiled else nullcontext():
                step.forward = _graph(forward)
        else:
            step.forward = forward
        return step


@contextmanager
def _compiled(blocks: nn.ModuleList) -> Iterator[None]:
    """Blocks run compiled; they share one compilation, for they are alike. Prompts are read by the plain ones."""
    for block in blocks:
        block.compile(dynamic=False)
    try:
        # The number of a block is no constant; and every batch size and kind of step is compiled, however many.
        with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=64):
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def _graph(forward: Callable[[], None]) -> Callable[[], None]:
    """A recording of `forward`; what the warm-up wrote is overwritten when a prompt is filled in."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    replay: Callable[[], None] = graph.replay
    return replay


def _states(prompt: Any, choice: Choice | None) -> list[tuple[Tensor, Tensor]]:
    """Keys and values that a prompt left and that stay, of every block."""
    if choice is None:
        return [(layer.keys, layer.values) for layer in prompt.layers]
    return kept_states(prompt, choice.heads_BLG)


def _fill(step: Step, states: list[tuple[Tensor, Tensor]], real_BT: Tensor, positions_BT: Tensor) -> None:
    """Puts what a prompt left where the recording reads it."""
    length = real_BT.shape[1]
    for layer, (keys, values) in zip(step.layers, states, strict=True):
        layer.keys_BGTC[:, :, :length] = keys
        layer.values_BGTC[:, :, :length] = values
    step.positions_B1.copy_(positions_BT[:, -1:] + 1)
    step.mask_B11T.zero_()
    step.mask_B11T[:, 0, 0, :length] = real_BT.to(torch.bool)
    step.slot_1.fill_(length)
