"""Speed, memory, loading time and texts of a pair of models, in turns on this machine.

A B A B …: every round times the dense model and then the candidate, so that what else the machine does meets both; the
first round warms up and is not kept. What is compared is the ratio within a round. All weight files were read before,
so loading is from the page cache for both. A contextual model's choice and copies are part of its writing.
"""

from collections.abc import Callable, Sequence
from typing import Any

from niwaki.measure.compare.token_metrics import decode_one, estimate
from niwaki.measure.compare.worker import Worker
from niwaki.measure.intervals import median_interval
from niwaki.measure.schema import Generation, Memory, Speed, Throughput


def measure_speed(
    dense: Worker,
    candidate: Worker,
    ids: Sequence[int],
    new_tokens: int,
    rounds: int,
    confidence: float,
    after_round: Callable[[], None] = lambda: None,
) -> Speed:
    """Reads the prompt `ids` and writes `new_tokens` behind it, `rounds` times each and once to warm up."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        for name, worker in (("dense", dense), ("candidate", candidate)):
            found = worker.ask(ids=list(ids), new_tokens=new_tokens)
            if number:
                for part in ("prefill", "decode"):
                    seconds.setdefault((part, name), []).append(found[f"{part}_seconds"])
        after_round()
    paces = {
        part: _pace(tokens, seconds[part, "dense"], seconds[part, "candidate"], confidence)
        for part, tokens in (("prefill", len(ids)), ("decode", new_tokens))
    }
    return Speed(threads=dense.loaded["threads"], **paces)


def memory_of(worker: Worker) -> Memory:
    """Before loading, after it, and at the highest until now."""
    names = ("before_bytes", "loaded_bytes", "device_loaded_bytes")
    return Memory(**{name: worker.loaded[name] for name in names}, **worker.ask())


def write_both(
    dense: Worker, candidate: Worker, prompts: Sequence[list[int]], new_tokens: int, tokenizer: Any
) -> tuple[Generation, ...]:
    """Every prompt continued greedily by both, up to the end token."""
    found = []
    for ids in prompts:
        theirs, ours = (
            worker.ask(ids=ids, new_tokens=new_tokens, stop=tokenizer.eos_token_id)["ids"]
            for worker in (dense, candidate)
        )
        found.append(
            Generation(
                prompt=tokenizer.decode(ids),
                dense=tuple(decode_one(tokenizer, token) for token in theirs),
                candidate=tuple(decode_one(tokenizer, token) for token in ours),
                dense_text=tokenizer.decode(theirs),
                candidate_text=tokenizer.decode(ours),
                diverges_at=_first_difference(theirs, ours),
            )
        )
    return tuple(found)


def _first_difference(theirs: list[int], ours: list[int]) -> int | None:
    if theirs == ours:
        return None
    same = (a == b for a, b in zip(theirs, ours, strict=False))
    return next((place for place, equal in enumerate(same) if not equal), min(len(theirs), len(ours)))


def _pace(tokens: int, dense: list[float], candidate: list[float], confidence: float) -> Throughput:
    ratios = [ours / theirs for theirs, ours in zip(dense, candidate, strict=True)]
    speeds = [tuple(tokens / seconds for seconds in part) for part in (dense, candidate)]
    return Throughput(
        tokens=tokens,
        dense_tokens_per_s=speeds[0],
        candidate_tokens_per_s=speeds[1],
        dense_median=median_interval(list(speeds[0]), confidence)[0],
        candidate_median=median_interval(list(speeds[1]), confidence)[0],
        latency_ratio=estimate(median_interval(ratios, confidence), len(ratios)),
    )
