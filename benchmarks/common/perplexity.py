"""Perplexity of a model on the two evaluation texts of the quality benchmarks, and its spread over seeds."""

import statistics
from pathlib import Path

import niwaki

TEXTS = {"reviews": "eval_reviews.jsonl", "wikitext2": "wikitext2_test.txt"}


def perplexities(model: str | Path, data: Path, device: str, reference: str | None = None) -> dict:
    """Return the perplexities of a model, and with `reference` the divergence from it."""
    files = {name: str(data / file) for name, file in TEXTS.items()}
    scores = niwaki.evaluate(
        model, reference=reference, data=list(files.values()), max_tokens=50_000, device=device, dtype="float32"
    )
    found = {"perplexity": {name: scores["perplexity"][path] for name, path in files.items()}}
    if reference is not None:
        found["kl_reviews"] = scores["kl"][files["reviews"]]
        found["top1_agreement_reviews"] = scores["top1_agreement"][files["reviews"]]
    return found


def spread(values: list[float]) -> dict:
    """Return mean and standard deviation."""
    return {"mean": statistics.mean(values), "stdev": statistics.stdev(values) if len(values) > 1 else None}
