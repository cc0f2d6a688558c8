"""Speed, memory and texts of a pair of models, in turns on this machine.

A B A B …: every round times the dense model, then the candidate, so that other load on the machine meets both. The
first round is a warm-up and is dropped. The ratio within a round is compared. All weight files were read before, so
both models load from the page cache. Decoding of a contextual model includes its selection and its copies.
"""

from collections.abc import Callable, Sequence
from typing import Any

from niwaki.measure.compare.token_metrics import decode_one, make_estimate
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
    """Time `rounds` prefills of the prompt `ids`, each with `new_tokens` decoded after it, after one warm-up."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        for name, worker in (("dense", dense), ("candidate", candidate)):
            answer = worker.ask(ids=list(ids), new_tokens=new_tokens)
            if number:
                for part in ("prefill", "decode"):
                    seconds.setdefault((part, name), []).append(answer[f"{part}_seconds"])
        after_round()
    throughputs = {
        part: _throughput(tokens, seconds[part, "dense"], seconds[part, "candidate"], confidence)
        for part, tokens in (("prefill", len(ids)), ("decode", new_tokens))
    }
    return Speed(threads=dense.loaded["threads"], **throughputs)


def read_memory(worker: Worker) -> Memory:
    """Return the memory of a worker: before loading, after it, and the peak until now."""
    names = ("before_bytes", "loaded_bytes", "device_loaded_bytes")
    return Memory(**{name: worker.loaded[name] for name in names}, **worker.ask())


def continue_prompts(
    dense: Worker, candidate: Worker, prompts: Sequence[list[int]], new_tokens: int, tokenizer: Any
) -> tuple[Generation, ...]:
    """Continue every prompt greedily with both models, up to the end token."""
    generations = []
    for ids in prompts:
        dense_ids, own_ids = (
            worker.ask(ids=ids, new_tokens=new_tokens, stop=tokenizer.eos_token_id)["ids"]
            for worker in (dense, candidate)
        )
        generations.append(
            Generation(
                prompt=tokenizer.decode(ids),
                dense=tuple(decode_one(tokenizer, token) for token in dense_ids),
                candidate=tuple(decode_one(tokenizer, token) for token in own_ids),
                dense_text=tokenizer.decode(dense_ids),
                candidate_text=tokenizer.decode(own_ids),
                diverges_at=_first_difference(dense_ids, own_ids),
            )
        )
    return tuple(generations)


def _first_difference(dense: list[int], candidate: list[int]) -> int | None:
    if dense == candidate:
        return None
    same = (a == b for a, b in zip(dense, candidate, strict=False))
    return next((place for place, equal in enumerate(same) if not equal), min(len(dense), len(candidate)))


def _throughput(tokens: int, dense: list[float], candidate: list[float], confidence: float) -> Throughput:
    ratios = [own / other for other, own in zip(dense, candidate, strict=True)]
    speeds = [tuple(tokens / seconds for seconds in part) for part in (dense, candidate)]
    return Throughput(
        tokens=tokens,
        dense_tokens_per_s=speeds[0],
        candidate_tokens_per_s=speeds[1],
        dense_median=median_interval(list(speeds[0]), confidence)[0],
        candidate_median=median_interval(list(speeds[1]), confidence)[0],
        latency_ratio=make_estimate(median_interval(ratios, confidence), len(ratios)),
    )
