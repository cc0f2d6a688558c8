"""Decoding in memory of fixed size, one token of every sequence per step: on a GPU a step is one CUDA graph.

A step of a small or a sparse model takes less time than Python needs to launch it, so no saving would show. Here keys
and values are in a static cache, and every step advances the mask and the positions itself. The whole forward is
recorded once and replayed for every token.

A contextual model reads the prompt and chooses the units as in `generate` (`runtime.contextual`). The copies of the
kept units have a fixed address. So the next sequence fills them again, and the same recording runs. (`local` masks have
the same shapes for all inputs.) There is one choice, after the prompt: a refresh and a verification need a growing
cache, which transformers' `generate` has.

Cost: keys and values for `room` tokens from the start. The first sequence of a shape is recorded (three more steps).
On a CPU the same steps run one by one: correct, but no faster than `generate`.

Legend: B sequences, T tokens, V vocabulary, G groups of heads, C channels.

    generator = CudaGraphGenerator(model, room=512)
    ids_BN = generator.generate(ids_BT, max_new_tokens=128)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.model.anatomy import find_blocks
from niwaki.runtime.contextual.compact import CompactBlocks, Swap, kept_states
from niwaki.runtime.contextual.sequence import ActiveUnits
from niwaki.runtime.contextual.sparsity import Contextual

WARM_UP = 2  # steps before the recording, in which libraries allocate their workspaces


def greedy(logits_BV: Tensor) -> Tensor:
    """Return the token [B, 1] with the largest logit."""
    return logits_BV.argmax(-1, keepdim=True)


class StaticLayer:
    """Keys and values of one block in fixed memory; `slot_1` is the index of the next token."""

    def __init__(self, keys_BGTC: Tensor, values_BGTC: Tensor, slot_1: Tensor) -> None:
        self.keys_BGTC, self.values_BGTC, self.slot_1 = keys_BGTC, values_BGTC, slot_1

    def update(self, keys_BG1C: Tensor, values_BG1C: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the next token and return all keys and values; attention calls this on a cache of transformers."""
        self.keys_BGTC.index_copy_(2, self.slot_1, keys_BG1C)
        self.values_BGTC.index_copy_(2, self.slot_1, values_BG1C)
        return self.keys_BGTC, self.values_BGTC


class BlockWithLayer(nn.Module):
    """Wrapper of a block that replaces the `cache` of all blocks by the layer of this one, in any argument.

    So all blocks run the same compiled code.
    """

    def __init__(self, block: nn.Module, cache: Any, layer: StaticLayer) -> None:
        super().__init__()
        self.block, self.cache, self.layer = block, cache, layer

    def __getattr__(self, name: str) -> Any:
        """Return attributes that models read from their blocks, such as the kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block with its own layer."""
        given = {name: self.layer if value is self.cache else value for name, value in kwargs.items()}
        return self.block(*(self.layer if value is self.cache else value for value in args), **given)


@dataclass
class RecordedStep:
    """One recorded forward, and the memory that it reads and writes."""

    layers: list[StaticLayer]
    ids_B1: Tensor
    positions_B1: Tensor
    mask_B11T: Tensor
    slot_1: Tensor
    logits_BV: Tensor
    sparse: bool
    forward: Callable[[], None]

    def replay(self, ids_B1: Tensor) -> Tensor:
        """Return logits [B, V] after these tokens; the next replay overwrites them."""
        self.ids_B1.copy_(ids_B1)
        self.forward()
        return self.logits_BV


class CudaGraphGenerator:
    """Generator for one model, dense or contextual, of up to `room` tokens per sequence, prompt included.

    `compiled`: torch.compile fuses the small operations of a block, in about ten seconds for each kind of step.
    """

    def __init__(self, model: Any, room: int, *, compiled: bool = False) -> None:
        self.model, self.room, self.compiled = model, room, compiled
        self.contextual: Contextual | None = getattr(model, "contextual", None)
        self._steps: dict[tuple[Any, ...], RecordedStep] = {}
        self._active: ActiveUnits | None = None  # of the last prompts

    @torch.no_grad()
    def generate(
        self,
        ids_BT: Tensor,
        *,
        max_new_tokens: int,
        mask_BT: Tensor | None = None,
        pick: Callable[[Tensor], Tensor] = greedy,
    ) -> Tensor:
        """Return the new tokens [B, N] after prompts that are padded on the left where `mask_BT` is 0.

        Raises InputError if they do not fit in `room`, or if the model attends within a window.
        """
        if max_new_tokens < 1 or ids_BT.shape[1] + max_new_tokens > self.room:
            raise InputError(
                f"{ids_BT.shape[1]} tokens and max_new_tokens {max_new_tokens} do not fit in room {self.room}"
            )
        logits_BV, step = self.prefill(ids_BT, mask_BT)
        tokens = [pick(logits_BV)]
        while len(tokens) < max_new_tokens:
            tokens.append(pick(step.replay(tokens[-1])))
        if self.contextual is not None and self.contextual.enabled:
            record = self.contextual.records[-1]
            record.count(max_new_tokens - 1, sparse=step.sparse)
            if self._active is not None:
                self._active.blocks.account(record)
        return torch.cat(tokens, dim=1)

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> tuple[Tensor, RecordedStep]:
        """Read prompts; return the logits [B, V] after them, and the step for the next tokens."""
        from transformers import DynamicCache

        real_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT.to(ids_BT)
        cache: Any = DynamicCache(config=self.model.config)
        if any(layer.is_sliding for layer in cache.layers):
            raise InputError("this model attends within a window, which a fixed cache does not support: use generate")
        positions_BT = (real_BT.cumsum(1) - 1).clamp_min(0)
        output = self.model(
            input_ids=ids_BT, attention_mask=real_BT, position_ids=positions_BT, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        active = None if self.contextual is None or not self.contextual.enabled else self.contextual.choose()
        states, self._active = _states(cache, active), active
        step = self._step(active, states)
        if active is not None:
            active.blocks.start_account()  # without the steps of a recording
        _fill(step, states, real_BT, positions_BT)
        return output.logits[:, -1], step

    def _step(self, active: ActiveUnits | None, states: list[tuple[Tensor, Tensor]]) -> RecordedStep:
        """Return the recording for this batch and these shapes; keep one dense and one sparse one."""
        addresses = () if active is None else active.blocks.addresses
        key = (active is None, len(states[0][0]), addresses)
        if key not in self._steps:
            self._steps = {other: step for other, step in self._steps.items() if other[0] != key[0]}
            self._steps[key] = self._record(active, states)
        return self._steps[key]

    def _record(self, active: ActiveUnits | None, states: list[tuple[Tensor, Tensor]]) -> RecordedStep:
        from transformers import DynamicCache

        count, device = len(states[0][0]), states[0][0].device
        ids_B1, positions_B1 = (torch.zeros(count, 1, dtype=torch.int64, device=device) for _ in range(2))
        mask_B11T = torch.zeros(count, 1, 1, self.room, dtype=torch.bool, device=device)
        slot_1 = torch.zeros(1, dtype=torch.int64, device=device)
        layers = []
        for keys, values in states:
            sizes = (*keys.shape[:2], self.room, keys.shape[3]), (*values.shape[:2], self.room, values.shape[3])
            layers.append(StaticLayer(keys.new_zeros(sizes[0]), values.new_zeros(sizes[1]), slot_1))
        rows = self.model.get_output_embeddings().out_features  # a packed head has no weight
        logits_BV = torch.zeros(count, rows, dtype=self.model.dtype, device=device)
        sparse = active is not None
        step = RecordedStep(layers, ids_B1, positions_B1, mask_B11T, slot_1, logits_BV, sparse, lambda: None)
        blocks, cache = find_blocks(self.model)[1], DynamicCache(config=self.model.config)
        wrapped = [BlockWithLayer(block, cache, layer) for block, layer in zip(blocks, layers, strict=True)]
        static_blocks = CompactBlocks([Swap(blocks, str(index), block) for index, block in enumerate(wrapped)])

        def forward() -> None:
            mask_B11T.index_fill_(3, slot_1, True)
            with (
                nullcontext() if self.contextual is None else self.contextual.applied(active),
                static_blocks.applied(),
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
    """Run blocks compiled inside; equal blocks share one compilation. The prefill stays outside and is not compiled."""
    for block in blocks:
        block.compile(dynamic=False)
    try:
        # The index of a block is not a constant; every batch size and kind of step is compiled.
        with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=64):
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def _graph(forward: Callable[[], None]) -> Callable[[], None]:
    """Record `forward` and return its replay; a prompt overwrites what the warm-up wrote."""
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


def _states(cache: Any, active: ActiveUnits | None) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values of the active heads that a prompt left, for every block."""
    if active is None or active.heads_BLG is None:
        return [(layer.keys, layer.values) for layer in cache.layers]
    return kept_states(cache, active.heads_BLG)


def _fill(step: RecordedStep, states: list[tuple[Tensor, Tensor]], real_BT: Tensor, positions_BT: Tensor) -> None:
    """Copy keys, values, mask and positions of a prompt to the memory of the recording."""
    length = real_BT.shape[1]
    for layer, (keys, values) in zip(step.layers, states, strict=True):
        layer.keys_BGTC[:, :, :length] = keys
        layer.values_BGTC[:, :, :length] = values
    step.positions_B1.copy_(positions_BT[:, -1:] + 1)
    step.mask_B11T.zero_()
    step.mask_B11T[:, 0, 0, :length] = real_BT.to(torch.bool)
    step.slot_1.fill_(length)
