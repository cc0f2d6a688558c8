"""Commands that compare and judge; `cli` puts them under their names. Exit code 0: passed, 1: not, 2: wrong input."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from niwaki.cli.options import check_given
from niwaki.errors import InputError, OutputError

TEXT = "Text: .txt, .jsonl (with `domain`: also broken down by it), .parquet or a data set name. Repeatable."
TASKS = 'Multiple choice, JSONL, a line each: {"pairs": [\\[context, continuation], ...], "gold": index}. Repeatable.'
PROMPTS = 'Prompts to continue: .txt, one a line, or .jsonl, {"prompt": text} a line; first tokens of data if left out.'
SPEED = "Rounds of reading and writing in turns; 0 measures no speed, memory, loading time and texts."
CARD = "Write what was measured on the model card of every candidate, a result of niwaki."
Dense = Annotated[str, typer.Argument(help="The dense model: a local folder or a hub id.", show_default=False)]
Outs = Annotated[list[str], typer.Argument(metavar="OUT...", help="Candidates.", show_default=False)]
err_console = Console(stderr=True)


def compare(
    dense: Dense,
    out: Outs,
    data: Annotated[list[str] | None, typer.Option(help=TEXT)] = None,
    tasks: Annotated[list[str] | None, typer.Option(help=TASKS)] = None,
    gate: Annotated[Path | None, typer.Option(help="Limits to judge by, YAML (`niwaki gate`).")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for report.html, compare.json and junit.xml.")] = None,
    lang: Annotated[str, typer.Option(help="Language of report.html: en or ja.")] = "en",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier report.")] = False,
    update_card: Annotated[bool, typer.Option("--update-card", help=CARD)] = False,
    prompts: Annotated[Path | None, typer.Option(help=PROMPTS)] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    max_tokens: Annotated[int | None, typer.Option(help="Use the first N tokens of every data file.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first N questions of every task file.")] = None,
    rounds: Annotated[int, typer.Option(help=SPEED)] = 9,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the prompt that is timed. [dim]\\[default: 128][/]")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens written behind a prompt. [dim]\\[default: 32][/]")
    ] = None,
    field: Annotated[str, typer.Option(help="Text field of .jsonl and .parquet rows.")] = "text",
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    device: Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Arithmetic for quality: auto (float32 on the CPU, else as stored), float32, ...")
    ] = "auto",
) -> None:
    """Compare candidates with the dense model: quality, speed, memory, and a verdict as the exit code."""
    if gate is not None:
        from niwaki.measure.compare.gates import load_gates

        load_gates(gate)
    check_given(dense, *out, data=data, tasks=tasks)
    from niwaki.cli.progress import Display
    from niwaki.cli.tables import print_comparison
    from niwaki.measure.compare.comparison import compare as run

    settings: dict[str, Any] = {
        "data": data or (),
        "tasks": tasks or (),
        "gate": gate,
        "report": report,
        "lang": lang,
        "overwrite": overwrite,
        "update_card": update_card,
        "prompts": prompts,
        "seq_len": seq_len,
        "max_tokens": max_tokens,
        "limit": limit,
        "rounds": rounds,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "field": field,
        "seed": seed,
        "device": device,
        "dtype": dtype,
    }
    try:
        with Display(err_console) as display:
            found = run(dense, out, progress=display, **settings)
    except KeyboardInterrupt:
        err_console.print("interrupted: nothing was written")
        raise typer.Exit(130) from None  # 1 would be a verdict
    print_comparison(Console(), found)
    if report is not None:
        err_console.print(f"report: {report}/report.html", markup=False, highlight=False, soft_wrap=True)
    if found.passed is False:
        raise typer.Exit(1)


def gate(
    file: Annotated[Path, typer.Argument(help="The gate file.", show_default=False)],
    baseline: Annotated[
        Path | None, typer.Option(help="The compare.json of a report: measured baseline, or what is judged.")
    ] = None,
    init: Annotated[bool, typer.Option("--init", help="Write FILE from the baseline, with comments.")] = False,
    candidate: Annotated[
        str | None, typer.Option(help="Which candidate of the baseline; without it all are judged.")
    ] = None,
    margin: Annotated[float, typer.Option(help="How far beyond the baseline the limits lie, as a share.")] = 0.1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
) -> None:
    """Write the gates of FILE from a measured baseline, or judge a comparison by them without measuring again."""
    from niwaki.cli.tables import print_verdicts
    from niwaki.measure.compare.baseline import gate_text, only, read_comparison
    from niwaki.measure.compare.gates import judged, load_gates
    from niwaki.model.files import write_text

    if baseline is None:
        raise InputError("no baseline: give --baseline REPORT/compare.json, which `niwaki compare --report` writes")
    found = read_comparison(baseline)
    if not init:
        found = judged(found if candidate is None else only(found, candidate), load_gates(file))
        print_verdicts(Console(), found)
        if not found.passed:
            raise typer.Exit(1)
        return
    if file.exists() and not overwrite:
        raise OutputError(f"{file} already exists: choose another file, or replace it with --overwrite")
    if not file.parent.is_dir():
        raise OutputError(f"cannot write {file}: the folder {file.parent} does not exist")
    write_text(file, gate_text(found, candidate, margin))
    Console().print(f"gates: {file}", markup=False, highlight=False, soft_wrap=True)
