"""Results of a comparison on the model card of a candidate: a table with intervals, the gates, and the command.

They replace earlier numbers (see `evaluation_card`). The comparison with this candidate alone is written to
OUT/niwaki/comparison.json.

    niwaki compare MODEL OUT --data held-out.jsonl --update-card
"""

import shlex
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import EvalResult

from niwaki.compression.model_card import without_folders
from niwaki.compression.run_record import RECORD
from niwaki.compression.verify import replace_files
from niwaki.measure.report.evaluation_card import after_examples, check_card, entry, write_card_section
from niwaki.measure.schema import BUSY_SPREAD, Candidate, Comparison, Estimate, Throughput, write_comparison

COMPARISON = "comparison.json"
Row = tuple[str, str, str, str, str]


def put_comparison(folder: Path, comparison: Comparison, candidate: Candidate) -> None:
    """Write the results of `candidate` into README.md and niwaki/comparison.json of `folder`."""
    check_card(folder)
    alone = comparison.model_copy(update={"candidates": (candidate,), "passed": candidate.passed})

    def write(place: Path) -> None:
        (place / RECORD).mkdir()
        write_comparison(place / RECORD / COMPARISON, alone)

    replace_files(folder, write)
    write_card_section(folder, _text(comparison, candidate), list(_entries(candidate)))


def _entries(candidate: Candidate) -> Iterator[EvalResult]:
    for data in candidate.data:
        yield entry(Path(data.data).name, "perplexity", round(data.whole.perplexity, 4))
    for task in candidate.tasks:
        yield entry(Path(task.task).name, "accuracy", round(task.accuracy.accuracy, 4))
        yield entry(Path(task.task).name, "accuracy_norm", round(task.accuracy_norm.accuracy, 4))


def _text(comparison: Comparison, candidate: Candidate) -> str:
    """Return the table, the machine, the verdict if there are gates, and the command of the comparison."""
    rows = [*_quality(candidate, comparison.settings.shots), *_speed(comparison, candidate)]
    where = comparison.environment
    processor = where.accelerator or where.processor
    lines = [
        f"| data | measure | dense | this model | compared ({100 * comparison.confidence:.4g}% interval) |",
        "|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"Measured by `niwaki compare` on {comparison.date[:10]}, {processor}, {comparison.settings.dtype}: "
        f"{candidate.model.file_bytes:,} bytes of {comparison.dense.file_bytes:,}.",
    ]
    if candidate.passed is not None:
        kept = sum(verdict.passed for verdict in candidate.gates)
        word = "passed" if candidate.passed else "failed"
        lines += ["", f"Gates: {word}, {kept} of {len(candidate.gates)} pass."]
        lines += [f"- {verdict.gate}: {verdict.reason}" for verdict in candidate.gates if not verdict.passed]
    again = shlex.join(map(without_folders, shlex.split(comparison.command)))
    return "\n".join([*lines, "", f"    {again}"])


def _quality(candidate: Candidate, shots: int) -> Iterator[Row]:
    for data in candidate.data:
        one = data.whole
        name = f"{Path(data.data).name}, {one.tokens:,} tokens"
        dense, own = f"{one.dense_perplexity:.3f}", f"{one.perplexity:.3f}"
        yield name, "perplexity", dense, own, f"ratio {_with_ends(one.perplexity_ratio, '.3f')}"
        yield name, "KL to dense, nats/token", "0", "", _with_ends(one.kl, ".4f")
        yield name, "top-1 agreement", "100%", "", _with_ends(one.top1_agreement, ".2%")
    for task in candidate.tasks:
        name = f"{Path(task.task).name}, {task.questions} questions{after_examples(shots)}"
        for measure, paired in (("accuracy", task.accuracy), ("accuracy_norm", task.accuracy_norm)):
            values = f"{paired.dense_accuracy:.4f}", f"{paired.accuracy:.4f}"
            yield name, measure, *values, f"loss {_with_ends(paired.loss, '.4f')}"


def _speed(comparison: Comparison, candidate: Candidate) -> Iterator[Row]:
    if candidate.speed is None:
        return
    threads = f"{candidate.speed.threads} threads" if comparison.environment.accelerator is None else "one device"

    def row(measure: str, speed: Throughput) -> Row:
        values = f"{speed.dense_median:.1f}", f"{speed.candidate_median:.1f}"
        time = f"time {_with_ends(speed.latency_ratio, '.3f')}"
        if speed.dense_spread > BUSY_SPREAD:
            time += f"; a busy machine: rounds of the dense model differed by a factor of {speed.dense_spread:.0f}"
        return f"{speed.tokens} tokens, {threads}", measure, *values, time

    yield row("prefill, tokens/s", candidate.speed.prefill)
    yield row("decode, tokens/s", candidate.speed.decode)


def _with_ends(one: Estimate, form: str) -> str:
    ends = "" if one.low is None or one.high is None else f" ({one.low:{form}} to {one.high:{form}})"
    return f"{one.value:{form}}{ends}"
