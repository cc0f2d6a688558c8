"""The commands `niwaki compare` and `niwaki gate`, and their tables. Exit codes: 0 passed, 1 failed, 2 wrong input."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from niwaki.cli.options import (
    Bos,
    DenseModel,
    Device,
    Dtype,
    Field,
    LogitBytes,
    MaxQuestions,
    MaxTokens,
    SeqLen,
    Shots,
    Tasks,
    check_bos,
    check_inputs,
    check_new_file,
    console,
    error_console,
    print_line,
)
from niwaki.cli.tables import print_table
from niwaki.errors import InputError

if TYPE_CHECKING:
    from niwaki.measure.schema import Candidate, Comparison, Estimate, Model

TEXT_HELP = "Text: .txt, .jsonl (a `domain` per row adds results per domain), .parquet or a data set name. Repeatable."
PROMPTS_HELP = (
    'Prompts to continue: .txt, one per line, or .jsonl, {"prompt": text} per line. Without it: first tokens of data.'
)
ROUNDS_HELP = "Rounds of prefill and decode, in turns with the dense model. 0: no speed, memory, load time or answers."
SCORES_HELP = "Folder that keeps the scores of the dense model: a later comparison on the same inputs reads them."
CARD_HELP = "Write the measurements into the model card of each candidate that is a result of niwaki."


def compare(
    dense: DenseModel,
    out: Annotated[list[str], typer.Argument(metavar="OUT...", help="Candidates.", show_default=False)],
    data: Annotated[list[str] | None, typer.Option(help=TEXT_HELP)] = None,
    tasks: Tasks = None,
    gate: Annotated[Path | None, typer.Option(help="YAML file of limits (`niwaki gate`).")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for report.html, compare.json and junit.xml.")] = None,
    lang: Annotated[str, typer.Option(help="Language of report.html: en or ja.")] = "en",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier report.")] = False,
    update_card: Annotated[bool, typer.Option("--update-card", help=CARD_HELP)] = False,
    prompts: Annotated[Path | None, typer.Option(help=PROMPTS_HELP)] = None,
    seq_len: SeqLen = 1024,
    bos: Bos = "auto",
    max_tokens: MaxTokens = None,
    limit: MaxQuestions = None,
    shots: Shots = 0,
    rounds: Annotated[int, typer.Option(help=ROUNDS_HELP)] = 9,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the timed prompt. [dim]\\[default: 128][/]")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens generated after the timed prompt. [dim]\\[default: 32][/]")
    ] = None,
    field: Field = "text",
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap, and of the examples of --shots.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    logit_bytes: LogitBytes = None,
    dense_scores: Annotated[Path | None, typer.Option(help=SCORES_HELP)] = None,
) -> None:
    """Compare candidates with the dense model: quality, speed, memory, and a verdict as the exit code."""
    if gate is not None:
        from niwaki.measure.compare.gates import load_gates

        load_gates(gate)
    check_inputs(dense, *out, data=data, tasks=tasks, device=device)
    sources: dict[str, Any] = {"data": data or (), "tasks": tasks or (), "prompts": prompts, "field": field}
    work: dict[str, Any] = {"seq_len": seq_len, "max_tokens": max_tokens, "limit": limit, "rounds": rounds}
    work |= {"shots": shots, "dense_scores": dense_scores}
    timed: dict[str, Any] = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    outputs: dict[str, Any] = {"report": report, "lang": lang, "overwrite": overwrite, "update_card": update_card}
    settings: dict[str, Any] = {
        "gate": gate,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "logit_bytes": logit_bytes,
    }
    settings["bos"] = check_bos(bos)
    comparison = _compared(dense, out, sources | work | timed | outputs | settings)
    print_comparison(console, comparison)
    if report is not None:
        print_line(f"report: {report}/report.html", error_console)
    if comparison.passed is False:
        raise typer.Exit(1)


def _compared(dense: str, out: list[str], settings: dict[str, Any]) -> "Comparison":
    """Measure with progress on standard error. Exit with code 130 after Ctrl-C, because 1 would be a verdict."""
    from niwaki.cli.progress import Display
    from niwaki.measure.compare.comparison import compare as run

    try:
        with Display(error_console) as display:
            return run(dense, out, progress=display, **settings)
    except KeyboardInterrupt:
        error_console.print("interrupted: nothing was written")
        raise typer.Exit(130) from None


def gate(
    file: Annotated[Path, typer.Argument(help="The gate file.", show_default=False)],
    baseline: Annotated[
        Path | None, typer.Option(help="Required: the compare.json to judge, or the one that --init starts from.")
    ] = None,
    init: Annotated[
        bool, typer.Option("--init", help="Write FILE from the baseline, with comments, and judge nothing.")
    ] = False,
    candidate: Annotated[
        str | None,
        typer.Option(
            help="One candidate of the compare.json. Without it, all are judged. --init needs it if there are several."
        ),
    ] = None,
    margin: Annotated[
        float, typer.Option(help="With --init: distance of the limits from the baseline, as a share.")
    ] = 0.1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
) -> None:
    """Judge a compare.json by FILE; with --init, write FILE from it."""
    from niwaki.measure.compare.baseline import gate_text, select_candidate
    from niwaki.measure.compare.gates import judge_comparison, load_gates
    from niwaki.measure.schema import read_comparison
    from niwaki.model.files import write_text

    if baseline is None:
        raise InputError("no baseline: give --baseline REPORT/compare.json, which `niwaki compare --report` writes")
    comparison = read_comparison(baseline)
    if not init:
        comparison = comparison if candidate is None else select_candidate(comparison, candidate)
        comparison = judge_comparison(comparison, load_gates(file))
        print_verdicts(console, comparison)
        if not comparison.passed:
            raise typer.Exit(1)
        return
    check_new_file(file, overwrite=overwrite)
    write_text(file, gate_text(comparison, candidate, margin))
    print_line(f"gates: {file}")


def print_comparison(to: Console, comparison: "Comparison") -> None:
    """Print a table per candidate, then the verdicts."""
    for candidate in comparison.candidates:
        about = ", ".join(filter(None, [candidate.model.kind, candidate.model.method, candidate.model.target]))
        headers = ["", "dense", "candidate", "compared", f"{100 * comparison.confidence:.4g}% interval"]
        print_table(to, headers, _rows(comparison.dense, candidate), escape(f"{candidate.model.name} ({about})"))
        if candidate.scoring.how == "runtime":
            scoring = candidate.scoring
            print_line(
                f"{candidate.model.name}: scored after the first {scoring.first_tokens} tokens of {scoring.windows} "
                f"windows, {scoring.dense_windows} of them with all weights; the others skip "
                f"{scoring.skipped_frac:.0%}",
                to,
            )
    _print_unrest(to, comparison)
    print_verdicts(to, comparison)


def _print_unrest(to: Console, comparison: "Comparison") -> None:
    """Print a note if the machine was too busy for reliable speeds."""
    from niwaki.measure.schema import BUSY_SPREAD

    speeds = [candidate.speed for candidate in comparison.candidates if candidate.speed]
    spread = max((one.dense_spread for speed in speeds for one in speed.throughputs.values()), default=1.0)
    if spread > BUSY_SPREAD:
        to.print(
            f"[yellow]note:[/] rounds of the dense model alone differed by a factor of {spread:.0f}: the machine was "
            "busy, and the speeds are not reliable",
            highlight=False,
            soft_wrap=True,
        )


def print_verdicts(to: Console, comparison: "Comparison") -> None:
    """Print each gate with its reason, and one line for all of them."""
    if comparison.gate is None:
        to.print("no gates given: nothing was judged (--gate FILE)", highlight=False, soft_wrap=True)
        return
    for candidate in comparison.candidates:
        for verdict in candidate.gates:
            word = "[green]pass[/]" if verdict.passed else "[red]FAIL[/]"
            about = f" {verdict.about}" if verdict.about else ""
            line = escape(f"{candidate.model.name}: {verdict.gate}{about}: {verdict.reason}")
            to.print(f"{word} {line}", highlight=False, soft_wrap=True)
    gates = [verdict.passed for candidate in comparison.candidates for verdict in candidate.gates]
    summary = "[green]passed[/]: all" if comparison.passed else f"[red]FAILED[/]: {gates.count(False)} of"
    to.print(f"{summary} {len(gates)} gates", highlight=False, soft_wrap=True)


def _rows(dense: "Model", candidate: "Candidate") -> list[list[str]]:
    """Return the rows of a candidate: name, dense value, its own value, their ratio or difference, interval."""
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
        for name, pace in (("prefill", candidate.speed.prefill), ("decode", candidate.speed.decode)):
            ratio = pace.latency_ratio
            speeds = [f"{pace.dense_median:.1f}", f"{pace.candidate_median:.1f}", f"time {ratio.value:.3f}"]
            rows.append([f"{name}, tokens/s", *speeds, _interval(ratio, ".3f")])
    if model.memory is not None and dense.memory is not None:
        rows.append(["load time, s", f"{dense.load_seconds:.2f}", f"{model.load_seconds:.2f}", "", ""])
        peaks = [one.memory.device_peak_bytes or one.memory.peak_bytes for one in (dense, model) if one.memory]
        rows.append(["peak memory, MB", *(f"{peak / 1e6:,.0f}" for peak in peaks), f"{peaks[1] / peaks[0]:.3f}", ""])
    return rows


def _interval(estimate: "Estimate", form: str) -> str:
    if estimate.low is None or estimate.high is None:
        return f"none from {estimate.units}"
    return f"{estimate.low:{form}} … {estimate.high:{form}}"
