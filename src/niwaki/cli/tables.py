"""What the commands print: tables whose numbers are never cut, and a method's description."""

import re
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from niwaki.measure.schema import Candidate, Comparison, Estimate, Model

NAME_COLUMNS = 12  # a first column narrower than this is no longer readable


def print_table(console: Console, headers: list[str], rows: list[list[str]], title: str | None = None) -> None:
    """Prints rows whose first column may fold and whose others are kept whole, wider than the console if need be.

    Where nobody watches (a pipe, a file) nothing folds at all.
    """
    widths = [max(cell_len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    least = min(widths[0], NAME_COLUMNS)
    others = sum(width + 2 for width in widths[1:])
    framed = not console.is_terminal or least + others + len(headers) + 3 <= console.width
    edges = len(headers) + 3 if framed else 0
    table = Table(title=title, box=box.HEAVY_HEAD if framed else None, pad_edge=framed)
    if console.is_terminal:
        table.width = others + edges + max(least, min(widths[0], console.width - others - edges))
    else:
        table.width = others + edges + widths[0]
    table.add_column(escape(headers[0]), overflow="fold")
    for header, width in zip(headers[1:], widths[1:], strict=True):
        table.add_column(escape(header), no_wrap=True, min_width=width)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table, crop=False, highlight=False)


def print_scores(console: Console, result: dict[str, Any]) -> None:
    """The result of `niwaki.evaluate`."""
    compared = result["reference"] is not None
    rows = []
    for path, tokens in result["tokens"].items():
        row = [path, f"{tokens:,}", f"{result['perplexity'][path]:.3f}"]
        if compared:
            dense = result["reference_perplexity"][path]
            ratio = result["perplexity"][path] / dense
            row += [f"{dense:.3f}", f"{ratio:.3f}", f"{result['kl'][path]:.4f}"]
            row.append(f"{result['top1_agreement'][path]:.2%}")
        rows.append(row)
    if rows:
        more = ["dense", "ratio", "KL", "top-1"] if compared else []
        print_table(console, ["data", "tokens", "perplexity", *more], rows)
    rows = []
    for path, found in result["tasks"].items():
        row = [path, str(found["items"]), *_accuracies(found)]
        rows.append([*row, *(_accuracies(found["reference"]) if compared else [])])
    if rows:
        more = ["dense", "normalised"] if compared else []
        print_table(console, ["task", "items", "accuracy", "normalised", *more], rows)
    if "lm_eval" in result:
        _print_harness(console, result["lm_eval"])


def _print_harness(console: Console, found: dict[str, Any]) -> None:
    """One row per task and metric, as lm_eval names them."""
    from niwaki.measure.report.measured import harness_metrics, harness_value

    dense = found.get("reference", {}).get("results")
    rows = []
    for task, metrics in found["results"].items():
        for metric in harness_metrics(metrics):
            values = [metrics] if dense is None else [metrics, dense[task]]
            rows.append([task, metric.removesuffix(",none"), *(harness_value(one, metric) for one in values)])
    print_table(console, ["lm_eval task", "metric", "value", *([] if dense is None else ["dense"])], rows)
    if counted := found.get("contextual"):
        console.print(
            f"{counted['sparse_tokens']:,} tokens were scored with a part of the weights, {counted['dense_tokens']:,} "
            f"and {counted['context_tokens']:,} of contexts with all of them",
            highlight=False,
            soft_wrap=True,
        )


def print_demo(console: Console, found: dict[str, Any], out: Path) -> None:
    """The numbers of `niwaki.cli.demo.run_demo`."""
    dense_ppl, pruned_ppl = found["perplexity"]
    rows = [
        ["bytes on disk", f"{found['bytes'][0]:,}", f"{found['bytes'][1]:,}"],
        ["zeros in decoder matrices", "0 %", f"{found['zeros_frac']:.2%}"],
        ["perplexity", f"{dense_ppl:.2f}", f"{pruned_ppl:.2f}"],
        ["KL to dense (nats/token)", "0", f"{found['kl']:.4f}"],
        ["top-1 agreement", "100 %", f"{found['top1_agreement']:.1%}"],
        ["seconds", "", f"{found['seconds_compress']} compress, {found['seconds_evaluate']} evaluate"],
    ]
    compressed = f"preset {found['preset']}, {found['target']}"
    print_table(console, ["", "dense", compressed], rows, "sapling, 7.3M parameters")
    console.print(
        f"{found['tokens']:,} evaluation tokens. Zeros are stored in place, so the bytes stay. Result: {out}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def print_comparison(console: Console, found: "Comparison") -> None:
    """A table for every candidate, then the verdicts."""
    for candidate in found.candidates:
        about = ", ".join(filter(None, [candidate.model.kind, candidate.model.method, candidate.model.target]))
        headers = ["", "dense", "candidate", "compared", f"{100 * found.confidence:.4g}% interval"]
        print_table(console, headers, _compared(found.dense, candidate), escape(f"{candidate.model.name} ({about})"))
        if candidate.scoring.how == "runtime":
            scoring = candidate.scoring
            line = (
                f"{candidate.model.name}: scored behind the first {scoring.first_tokens} tokens of {scoring.windows} "
                f"windows, {scoring.dense_windows} of them with all weights; the others skip {scoring.skipped_frac:.0%}"
            )
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    _print_unrest(console, found)
    print_verdicts(console, found)


def _print_unrest(console: Console, found: "Comparison") -> None:
    """A line if the machine was too busy for its speeds to say much."""
    from niwaki.measure.schema import BUSY

    paces = [pace for candidate in found.candidates if candidate.speed for pace in candidate.speed.paces.values()]
    swing = max((pace.dense_swing for pace in paces), default=1.0)
    if swing > BUSY:
        console.print(
            f"[yellow]note:[/] rounds of the dense model alone differed by a factor of {swing:.0f}: the machine was "
            "busy, and what is said of speed says little",
            highlight=False,
            soft_wrap=True,
        )


def print_verdicts(console: Console, found: "Comparison") -> None:
    """Every gate with its reason, and one line for the whole."""
    if found.gate is None:
        console.print("no gates given: nothing was judged (--gate FILE)", highlight=False, soft_wrap=True)
        return
    for candidate in found.candidates:
        for verdict in candidate.gates:
            word = "[green]pass[/]" if verdict.passed else "[red]FAIL[/]"
            about = f" {verdict.about}" if verdict.about else ""
            line = escape(f"{candidate.model.name}: {verdict.gate}{about}: {verdict.reason}")
            console.print(f"{word} {line}", highlight=False, soft_wrap=True)
    gates = [verdict.passed for candidate in found.candidates for verdict in candidate.gates]
    said = "[green]passed[/]: all" if found.passed else f"[red]FAILED[/]: {gates.count(False)} of"
    console.print(f"{said} {len(gates)} gates", highlight=False, soft_wrap=True)


def _compared(dense: "Model", candidate: "Candidate") -> list[list[str]]:
    model, rows = candidate.model, []
    rows.append(["file bytes", f"{dense.file_bytes:,}", f"{model.file_bytes:,}", f"{candidate.bytes_ratio:.3f}", ""])
    for data in candidate.data:
        for name, one in {"": data.whole, **data.domains}.items():
            where = f"{data.data}{': ' + name if name else ''}"
            ratio = one.perplexity_ratio
            perplexities = [f"{one.dense_perplexity:.3f}", f"{one.perplexity:.3f}", f"{ratio.value:.3f}"]
            rows.append([f"perplexity {where}", *perplexities, _interval(ratio, ".3f")])
            if not name:
                rows.append([f"KL {where}", "0", f"{one.kl.value:.4f}", "", _interval(one.kl, ".4f")])
                agreed = one.top1_agreement
                rows.append([f"top-1 {where}", "100%", f"{agreed.value:.2%}", "", _interval(agreed, ".2%")])
    for task in candidate.tasks:
        for name, answers in (("accuracy", task.accuracy), ("normalised", task.accuracy_norm)):
            accuracies = [f"{answers.dense_accuracy:.3f}", f"{answers.accuracy:.3f}", f"loss {answers.loss.value:.3f}"]
            rows.append([f"{name} {task.task}", *accuracies, _interval(answers.loss, ".3f")])
        flips = [f"{len(task.accuracy.right_to_wrong)} right→wrong", f"{len(task.accuracy.wrong_to_right)} wrong→right"]
        flips += [f"p {task.accuracy.mcnemar_p:.3f}", ""]
        rows.append([f"flips of {task.questions}", *flips])
    if candidate.speed is not None:
        for name, pace in (("prompt", candidate.speed.prefill), ("writing", candidate.speed.decode)):
            ratio = pace.latency_ratio
            speeds = [f"{pace.dense_median:.1f}", f"{pace.candidate_median:.1f}", f"time {ratio.value:.3f}"]
            rows.append([f"{name}, tokens/s", *speeds, _interval(ratio, ".3f")])
    if model.memory is not None and dense.memory is not None:
        rows.append(["loading, s", f"{dense.load_seconds:.2f}", f"{model.load_seconds:.2f}", "", ""])
        peaks = [one.memory.device_peak_bytes or one.memory.peak_bytes for one in (dense, model) if one.memory]
        rows.append(["peak memory, MB", *(f"{peak / 1e6:,.0f}" for peak in peaks), f"{peaks[1] / peaks[0]:.3f}", ""])
    return rows


def _interval(found: "Estimate", form: str) -> str:
    if found.low is None or found.high is None:
        return f"none from {found.units}"
    return f"{found.low:{form}} … {found.high:{form}}"


def print_methods(console: Console) -> None:
    """One row per method, then what the presets stand for."""
    from niwaki.config.presets import PRESETS
    from niwaki.methods.registry import EVERY, get_method

    table = Table("method", "what", "needs", "paper")
    for name in EVERY:
        method = get_method(name)
        what = method.__doc__.split("\n")[0].partition(": ")[2]
        table.add_row(name, what, _needs(method.needs(method.Config())), method.PAPER)
    console.print(table)
    for preset, recipe in PRESETS.items():
        options = " ".join(f"{name}={value}" for name, value in recipe["options"].items())
        console.print(f"--preset {preset}: {recipe['method']} with {options}", markup=False, highlight=False)


def print_method(console: Console, name: str) -> None:
    """A method's description, its paragraphs filled to the console, and its options."""
    from niwaki.methods.registry import get_method

    method = get_method(name)
    for paragraph in re.split(r"\n\s*\n", method.__doc__.strip("\n")):
        if paragraph.startswith("    "):
            console.print(paragraph.rstrip(), markup=False, highlight=False, soft_wrap=True)
        else:
            for item in re.split(r"\n(?=- |\d+\. )", paragraph):
                marker = re.match(r"- |\d+\. ", item)
                indent = " " * len(marker[0]) if marker else ""
                filled = textwrap.fill(" ".join(item.split()), console.width, subsequent_indent=indent)
                console.print(filled, markup=False, highlight=False, soft_wrap=True)
        console.print()
    for option in fields(method.Config):
        kind = getattr(option.type, "__name__", option.type)
        line = f"    --set {option.name}={option.default}  ({kind})"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not fields(method.Config):
        console.print(f"{name} has no options.", markup=False, highlight=False)


def _needs(needs: Any) -> str:
    parts = ["XᵀX per input"] if needs.gram else ["squared norms per input"] if needs.sqnorm else []
    parts += ["gradients"] if needs.gradient else []
    parts += ["windows to learn from"] if needs.windows else []
    return ", ".join(parts) or "no data"


def _accuracies(found: dict[str, Any]) -> list[str]:
    texts = []
    for name in ("accuracy", "accuracy_norm"):
        error = found[f"{name}_stderr"]
        texts.append(f"{found[name]:.3f}" + ("" if error is None else f" ± {error:.3f}"))
    return texts
