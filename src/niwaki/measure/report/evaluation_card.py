"""Measured quality on the model card of a result: a table between two marks, and `model-index` in its metadata.

The text around the marks stays. OUT/niwaki/evaluation.json has all numbers. A comparison replaces this table with its
own (`comparison_card`), so the card shows the last measurement.

    niwaki evaluate OUT --reference MODEL --data held-out.txt --update-card
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from niwaki.compression.model_card import BEGIN, END
from niwaki.compression.run_record import RECORD, RUN
from niwaki.compression.verify import replace_files
from niwaki.errors import InputError
from niwaki.model.files import write_text


def check_card(folder: Path) -> None:
    """Raise InputError for a folder without a model card of niwaki."""
    if not (folder / RECORD / RUN).is_file():
        raise InputError(f"--update-card: {folder} is not a result of niwaki (it has no niwaki/run.json)")
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if not -1 < text.find(BEGIN) < text.find(END):
        raise InputError(f"--update-card: {card} lacks the lines {BEGIN} and {END} around the numbers")


def put_evaluation(folder: Path, result: dict[str, Any]) -> None:
    """Write the result of `niwaki.evaluate` into README.md and niwaki/evaluation.json of `folder`."""
    check_card(folder)

    def write(place: Path) -> None:
        (place / RECORD).mkdir()
        write_text(place / RECORD / "evaluation.json", json.dumps(result, indent=2) + "\n")

    replace_files(folder, write)
    write_card_section(folder, _table(result), list(_entries(result)))


def write_card_section(folder: Path, text: str, entries: list[EvalResult]) -> None:
    """Replace the text between the marks of a card, and the evaluation results in its metadata."""
    path = folder / "README.md"
    card = ModelCard.load(path)
    card.data.model_name = card.data.model_name or folder.name
    card.data.eval_results = entries or None
    head, _, rest = card.text.partition(BEGIN)
    card.text = f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"
    write_text(path, str(card))


def entry(data: str, metric: str, value: float) -> EvalResult:
    """Return one number in the format of the Hugging Face hub."""
    return EvalResult("text-generation", data, data, metric, value)


def after_examples(shots: int) -> str:
    """Return what to say of the solved questions before each question, nothing without them."""
    return f", each after {shots} solved ones" if shots else ""


def harness_metrics(metrics: dict[str, Any]) -> list[str]:
    """Return the names of the metrics that lm_eval reports for a task, without their standard errors."""
    return [name for name, value in metrics.items() if isinstance(value, int | float) and "_stderr" not in name]


def harness_value(metrics: dict[str, Any], metric: str) -> str:
    """Format a metric with its standard error, if it has one."""
    name, comma, kind = metric.partition(",")
    error = metrics.get(f"{name}_stderr{comma}{kind}")
    return f"{metrics[metric]:.4g}" + (f" ± {error:.2g}" if isinstance(error, int | float) else "")


def _entries(result: dict[str, Any]) -> Iterator[EvalResult]:
    for file, value in result.get("perplexity", {}).items():
        yield entry(Path(file).name, "perplexity", round(value, 4))
    for file, scores in result["tasks"].items():
        for name in ("accuracy", "accuracy_norm"):
            yield entry(Path(file).name, name, round(scores[name], 4))
    for task, metrics in result.get("lm_eval", {}).get("results", {}).items():
        for metric in harness_metrics(metrics):
            yield entry(task, metric.removesuffix(",none"), round(metrics[metric], 4))


def _table(result: dict[str, Any]) -> str:
    """Return a Markdown table with one row per number, and a column for the reference if there is one."""
    rows = [*_text_rows(result), *_task_rows(result), *_harness_rows(result)]
    compared = result["reference"] is not None
    lines = [
        "| data | measure | value |" + (" dense |" if compared else ""),
        "|---|---|---|" + ("---|" if compared else ""),
    ]
    lines += ["| " + " | ".join(row if compared else row[:3]) + " |" for row in rows]
    how = f"Windows of {result['seq_len']} tokens, {result['dtype']}, {result['bytes']:,} bytes of weights"
    how += f" (dense: {result['reference_bytes']:,})." if compared else "."
    return "\n".join([*lines, "", how])


def _text_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    for file, tokens in result["tokens"].items():
        name = f"{Path(file).name}, {tokens:,} tokens"
        dense = result.get("reference_perplexity", {}).get(file)
        yield [name, "perplexity", f"{result['perplexity'][file]:.3f}", "" if dense is None else f"{dense:.3f}"]
        if dense is not None:
            yield [name, "KL to dense, nats/token", f"{result['kl'][file]:.4f}", "0"]
            yield [name, "top-1 agreement", f"{result['top1_agreement'][file]:.2%}", "100%"]


def _task_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    for file, scores in result["tasks"].items():
        name = f"{Path(file).name}, {scores['items']} questions{after_examples(result.get('shots', 0))}"
        for measure in ("accuracy", "accuracy_norm"):
            dense = scores.get("reference", {}).get(measure)
            yield [name, measure, f"{scores[measure]:.4f}", "" if dense is None else f"{dense:.4f}"]


def _harness_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    harness = result.get("lm_eval", {})
    dense = harness.get("reference", {}).get("results", {})
    for task, metrics in harness.get("results", {}).items():
        for metric in harness_metrics(metrics):
            other = harness_value(dense[task], metric) if task in dense else ""
            yield [f"{task} (lm_eval {harness['lm_eval']})", metric, harness_value(metrics, metric), other]
