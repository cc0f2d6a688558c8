"""Tokens per second of the engine with 1, 2, 4 and 8 sequences at once: the gain of one loop for all.

The engine runs alone, without the network. Greedy answers have equal length, prompts do not. The numbers of sequences
take turns. Results are medians of the rounds.

    python -m benchmarks.serving.serving_batch --out benchmarks/results/serving/serving-batch-cpu.json [--model MODEL]
"""

import argparse
import json
import queue
import statistics
import time
from pathlib import Path

import torch

import niwaki
from benchmarks.common.provenance import provenance
from niwaki.cli.demo import sapling
from niwaki.data.texts import load_tokenizer
from niwaki.serve.engine import Engine, EngineLimits
from niwaki.serve.jobs import Event, Finished, Job
from niwaki.serve.prometheus import Metrics
from niwaki.serve.sampling import Sampling


def timed(engine: Engine, sequences: int, tokens: int) -> float:
    """Return the tokens per second, prompts included in the time."""
    events: queue.Queue[Event] = queue.Queue()
    began = time.perf_counter()
    for number in range(sequences):
        ids = [5 + place % 1000 for place in range(8 + 8 * number)]
        engine.submit(Job(ids, Sampling(temperature=0.0), tokens, events.put))
    left = sequences
    while left:
        left -= isinstance(events.get(), Finished)
    return sequences * tokens / (time.perf_counter() - began)


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=None, help="default: the sapling")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    folder = args.model or sapling()
    model = niwaki.load(folder, device=args.device, dtype=getattr(torch, args.dtype))
    engine = Engine(model, load_tokenizer(folder), EngineLimits(8, 64, 1024), Metrics())
    engine.decoding.end_tokens = frozenset()  # answers of equal length
    engine.start()
    found: dict[int, list[float]] = {count: [] for count in (1, 2, 4, 8)}
    for number in range(args.rounds + 1):
        for count, rates in found.items():
            rate = timed(engine, count, args.tokens)
            if number:  # the first warms up
                rates.append(rate)
    engine.close()
    medians = {count: statistics.median(rates) for count, rates in found.items()}
    result = {
        "what": f"tokens per second of the serving engine, {args.tokens} greedy tokens each, {args.dtype}",
        **provenance(args.device),
        "model": "sapling" if args.model is None else args.model.name,
        "threads": torch.get_num_threads(),
        "tokens_per_second": {str(count): round(rate, 1) for count, rate in medians.items()},
        "times_one": {str(count): round(rate / medians[1], 2) for count, rate in medians.items()},
        "rounds": {str(count): [round(rate, 1) for rate in rates] for count, rates in found.items()},
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
