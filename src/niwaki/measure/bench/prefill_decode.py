"""The two kinds of timed work: prefill of a prompt, and decoding after one, for any number of sequences.

Decoding is timed from the end of the prompt. On a GPU every step is one recorded CUDA graph, for the dense model too
(`runtime.cuda_graph`), so that launch times hide no difference. The model is called step by step on a CPU, and also if
attention has a window or a layer waits for the host. For a contextual model, prediction, selection and copies after a
prompt are part of the time.

Legend: B sequences, T tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from niwaki.measure.bench.timing import now
from niwaki.runtime.cuda_graph import CudaGraphGenerator

WARM_TOKENS = 16  # of a prompt that warms up a CPU, on which a whole prompt may take minutes
WARM_STEPS = 2


@dataclass(frozen=True)
class TimedWork:
    """Work to be timed: `run` returns its seconds, `warm_up` prepares for it."""

    run: Callable[[], float]
    warm_up: Callable[[], object]


def has_window(model: Any) -> bool:
    """Check for attention with a window, which a fixed cache cannot follow."""
    return any(layer.is_sliding for layer in _cache(model).layers)


def prefill_work(model: Any, ids_1T: Tensor) -> TimedWork:
    """Return the prefill of a prompt: its keys and values are kept, only the last token has logits."""

    @torch.no_grad()
    def prefill(ids: Tensor) -> float:
        begin = now(ids.device)
        model(input_ids=ids, past_key_values=_cache(model), use_cache=True, logits_to_keep=1)
        return now(ids.device) - begin

    first = ids_1T if ids_1T.is_cuda else ids_1T[:, :WARM_TOKENS]
    return TimedWork(lambda: prefill(ids_1T), lambda: prefill(first))


def decode_work(model: Any, ids_BT: Tensor, steps: int, *, graphs: bool) -> TimedWork:
    """Return the decoding of `steps` greedy tokens after each of the prompts."""
    decode = _graphed(model, ids_BT, steps) if graphs else _stepwise(model, ids_BT)
    return TimedWork(lambda: decode(steps), lambda: decode(min(WARM_STEPS, steps)))


def _stepwise(model: Any, ids_BT: Tensor) -> Callable[[int], float]:
    """Return a decoder that prefills once and crops its cache after each run, if the cache allows that."""
    reusable = getattr(model, "contextual", None) is None and not has_window(model)
    kept: list[tuple[Any, Tensor]] = []

    def prefill() -> tuple[Any, Tensor]:
        cache = _cache(model)
        logits = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return cache, logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def decode(steps: int) -> float:
        if reusable and not kept:
            kept.append(prefill())
        cache, token_B1 = kept[0] if reusable else prefill()
        begin = now(ids_BT.device)
        for _ in range(steps):
            logits = model(input_ids=token_B1, past_key_values=cache, use_cache=True).logits
            token_B1 = logits[:, -1:].argmax(-1)
        seconds = now(ids_BT.device) - begin
        if reusable:
            cache.crop(-steps)
        return seconds

    return decode


def _graphed(model: Any, ids_BT: Tensor, steps: int) -> Callable[[int], float]:
    generator = CudaGraphGenerator(model, room=ids_BT.shape[1] + steps)

    @torch.no_grad()
    def decode(steps: int) -> float:
        with _end_of_prompt(model) as end_times:
            logits_BV, step = generator.prefill(ids_BT)
            for _ in range(steps):
                logits_BV = step.replay(logits_BV.argmax(-1, keepdim=True))
        return now(ids_BT.device) - end_times[0]

    return decode


@contextmanager
def _end_of_prompt(model: Any) -> Iterator[list[float]]:
    """Yield a list that gets the end time of the first forward."""
    end_times: list[float] = []

    def stamp(*_: Any) -> None:
        if not end_times:
            end_times.append(now(model.device))

    handle = model.register_forward_hook(stamp)
    try:
        yield end_times
    finally:
        handle.remove()


def _cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)
