"""The two kinds of work that are timed: reading a prompt, and writing behind one, for any number of sequences.

Writing is timed from the end of the prompt. On a GPU every step is one recorded CUDA graph, for the dense model too
(`runtime.graphed`), so that launches hide no difference; on a CPU, and where attention has a window or a layer waits
for the host, the model is called step by step. What a contextual model predicts, chooses and copies behind a prompt is
part of the time.

Legend: B sequences, T tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from niwaki.measure.bench.timing import now
from niwaki.runtime.cuda_graph import Graphed

WARM_TOKENS = 16  # of a prompt that warms up a CPU, where a whole one may take minutes
WARM_STEPS = 2


@dataclass(frozen=True)
class Work:
    """Something that can be timed: `run` tells its seconds, `warm` prepares for it."""

    run: Callable[[], float]
    warm: Callable[[], object]


def has_window(model: Any) -> bool:
    """Whether some attention sees a window only, which a fixed cache does not follow."""
    return any(layer.is_sliding for layer in _cache(model).layers)


def reading(model: Any, ids_1T: Tensor) -> Work:
    """A prompt, its keys and values kept, the logits of its last token alone."""

    @torch.no_grad()
    def read(ids: Tensor) -> float:
        begin = now(ids.device)
        model(input_ids=ids, past_key_values=_cache(model), use_cache=True, logits_to_keep=1)
        return now(ids.device) - begin

    first = ids_1T if ids_1T.is_cuda else ids_1T[:, :WARM_TOKENS]
    return Work(lambda: read(ids_1T), lambda: read(first))


def writing(model: Any, ids_BT: Tensor, steps: int, *, graphs: bool) -> Work:
    """`steps` greedy tokens for each of these prompts."""
    write = _graphed(model, ids_BT, steps) if graphs else _stepwise(model, ids_BT)
    return Work(lambda: write(steps), lambda: write(min(WARM_STEPS, steps)))


def _stepwise(model: Any, ids_BT: Tensor) -> Callable[[int], float]:
    """The prompts are read once and what is written behind them is cut off again, where a cache allows it."""
    whole = getattr(model, "contextual", None) is None and not has_window(model)
    kept: list[tuple[Any, Tensor]] = []

    def read() -> tuple[Any, Tensor]:
        cache = _cache(model)
        logits = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return cache, logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def write(steps: int) -> float:
        if whole and not kept:
            kept.append(read())
        cache, token_B1 = kept[0] if whole else read()
        begin = now(ids_BT.device)
        for _ in range(steps):
            logits = model(input_ids=token_B1, past_key_values=cache, use_cache=True).logits
            token_B1 = logits[:, -1:].argmax(-1)
        seconds = now(ids_BT.device) - begin
        if whole:
            cache.crop(-steps)
        return seconds

    return write


def _graphed(model: Any, ids_BT: Tensor, steps: int) -> Callable[[int], float]:
    writer = Graphed(model, room=ids_BT.shape[1] + steps)

    @torch.no_grad()
    def write(steps: int) -> float:
        with _end_of_prompt(model) as ended:
            logits_BV, step = writer.start(ids_BT)
            for _ in range(steps):
                logits_BV = step.replay(logits_BV.argmax(-1, keepdim=True))
        return now(ids_BT.device) - ended[0]

    return write


@contextmanager
def _end_of_prompt(model: Any) -> Iterator[list[float]]:
    """When the first forward inside was over."""
    seen: list[float] = []

    def stamp(*_: Any) -> None:
        if not seen:
            seen.append(now(model.device))

    handle = model.register_forward_hook(stamp)
    try:
        yield seen
    finally:
        handle.remove()


def _cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)
