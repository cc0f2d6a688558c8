"""Seconds of scoring a multiple-choice task: `niwaki.evaluate` and a plain batched loop over transformers, in turns.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.task_scoring MODEL TASK.jsonl --limit 200 --rounds 3 \\
        --out benchmarks/results/speed/task-scoring-cpu.json

The loop is what one writes by hand: load the model, tokenize every pair, sort by length, pad batches of `--batch`
sequences on the right. It takes the log-softmax of all logits, and sums that of the continuation. Both compute in
float32, and both times begin before the model is read. The result also has the seconds of the processor, because other
work on the machine does not count in them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import niwaki
from benchmarks.common.provenance import provenance


def plain_loop(model: str, task: Path, limit: int, batch: int, device: str) -> float:
    """Return the accuracy of a model on a task file."""
    rows = [json.loads(line) for line in task.read_text(encoding="utf-8").splitlines()[:limit]]
    tokenizer = AutoTokenizer.from_pretrained(model)
    decoder: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
    sequences = []
    for item, row in enumerate(rows):
        for choice, (context, end) in enumerate(row["pairs"]):
            ids = tokenizer(context + end)["input_ids"]
            sequences.append((ids, len(tokenizer(context)["input_ids"]), item, choice))
    sequences.sort(key=lambda one: len(one[0]))
    scores = [[0.0] * len(row["pairs"]) for row in rows]
    for first in range(0, len(sequences), batch):
        part = sequences[first : first + batch]
        longest = max(len(ids) for ids, *_ in part)
        ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids, *_ in part], device=device)
        with torch.no_grad():
            logprobs_BTV = decoder(ids_BT, use_cache=False).logits.log_softmax(-1)
        for row, (ids, split, item, choice) in enumerate(part):
            wanted_T1 = ids_BT[row, split : len(ids), None]
            scores[item][choice] = float(logprobs_BTV[row, split - 1 : len(ids) - 1].gather(1, wanted_T1).sum())
    right = sum(own.index(max(own)) == row["gold"] for own, row in zip(scores, rows, strict=True))
    return right / len(rows)


def ours(model: str, task: Path, limit: int, device: str) -> float:
    """Return the accuracy by `niwaki.evaluate`."""
    found = niwaki.evaluate(model, tasks=task, limit=limit, device=device, dtype="float32")
    return float(found["tasks"][str(task)]["accuracy"])


def timed(work: Callable[[], float]) -> tuple[float, float, float]:
    """Return the accuracy, the seconds, and the seconds of the processor."""
    begin, processor = time.perf_counter(), time.process_time()
    accuracy = work()
    return accuracy, time.perf_counter() - begin, time.process_time() - processor


def main() -> None:
    """Measure both in turns, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("task", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32, help="sequences per batch of the plain loop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    works = {
        "niwaki": lambda: ours(args.model, args.task, args.limit, args.device),
        "plain_loop": lambda: plain_loop(args.model, args.task, args.limit, args.batch, args.device),
    }
    rounds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in works}
    for number in range(args.rounds):
        for name in sorted(works, reverse=bool(number % 2)):  # each begins every other round
            rounds[name].append(timed(works[name]))
            print(name, *(round(value, 3) for value in rounds[name][-1]), flush=True)
    seconds, processor = (
        {name: statistics.median(row[column] for row in rows) for name, rows in rounds.items()} for column in (1, 2)
    )
    result = {
        "what": f"{args.limit} items of {args.task.name} by niwaki.evaluate and by a loop of batches of {args.batch}, "
        "float32, with loading; medians of rounds in turns",
        **provenance(args.device),
        "threads": torch.get_num_threads(),
        "accuracy": {name: rows[0][0] for name, rows in rounds.items()},
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "processor_seconds": {name: round(value, 2) for name, value in processor.items()},
        "ratio": round(seconds["niwaki"] / seconds["plain_loop"], 3),
        "processor_ratio": round(processor["niwaki"] / processor["plain_loop"], 3),
        "rounds": {name: [[round(v, 2) for v in row[1:]] for row in rows] for name, rows in rounds.items()},
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
