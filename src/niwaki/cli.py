"""The command line: parse → config → call. Heavy imports happen inside the commands."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from niwaki.errors import InputError, NiwakiError

app = typer.Typer(
    name="niwaki",
    help="Make pretrained language models smaller and faster after training, and prove what that cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out_console = Console()
err_console = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="A local model folder or a hub id.", show_default=False)]


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(help="New folder for the result.", show_default=False)],
    method: Annotated[str | None, typer.Option(help="See `niwaki methods`.")] = None,
    target: Annotated[str | None, typer.Option(help="Zeros: 0.5, 50%, 2:4, 4:8.")] = None,
    allocation: Annotated[str | None, typer.Option(help="uniform or owl.")] = None,
    calibration: Annotated[
        list[str] | None, typer.Option(help="Text: .txt, .jsonl, .parquet or a data set name. Repeatable.")
    ] = None,
    field: Annotated[str | None, typer.Option(help="Text field of .jsonl and .parquet rows.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows [128].")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per window [2048].")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML with any of these; flags win.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Method option key=value. Repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed [0].")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda [auto].")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Arithmetic: auto (float32 on the CPU, else as stored), float32, ...")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens per forward.")] = None,
    activation_bytes: Annotated[
        int | None,
        typer.Option(help="Most bytes of hidden states to keep in memory before a mapped file is used."),
    ] = None,
    dense_stream: Annotated[bool, typer.Option(help="Also follow the dense model: drift per depth.")] = False,
    resume: Annotated[bool, typer.Option(help="Continue an unfinished run.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing OUT.")] = False,
) -> None:
    """Compress MODEL into OUT, block by block."""
    from niwaki.compression import compress as run
    from niwaki.config import load_recipe
    from niwaki.progress import Display

    values: dict[str, Any] = load_recipe(recipe) if recipe else {}
    values |= _given(
        method=method,
        target=target,
        allocation=allocation,
        seed=seed,
        device=device,
        dtype=dtype,
        batch_tokens=batch_tokens,
        activation_bytes=activation_bytes,
    )
    files = tuple(calibration) if calibration else None
    text = _given(files=files, field=field, samples=samples, seq_len=seq_len)
    values["calibration"] = {**(values.get("calibration") or {}), **text}
    values["options"] = {**(values.get("options") or {}), **_key_values(set_ or [])}
    _require(values, "method", "target")
    try:
        with Display(err_console) as display:
            record = run(
                model, out, resume=resume, overwrite=overwrite, dense_stream=dense_stream, report=display, **values
            )
    except KeyboardInterrupt:
        err_console.print("interrupted: finished blocks are kept, go on with the same command and --resume")
        raise typer.Exit(130) from None
    _print_record(out, record)


@app.command()
def evaluate(
    model: Model,
    data: Annotated[list[str] | None, typer.Option(help="Text: .txt, .jsonl, .parquet or a data set name.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="Multiple-choice JSONL. Repeatable.")] = None,
    reference: Annotated[str | None, typer.Option(help="Dense model: adds KL and top-1 agreement.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    max_tokens: Annotated[int | None, typer.Option(help="Use the first N tokens of every data file.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first N questions of every task file.")] = None,
    field: Annotated[str, typer.Option(help="Text field of .jsonl and .parquet rows.")] = "text",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Arithmetic: auto, float32, bfloat16 or float16.")] = "auto",
    json_: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
) -> None:
    """Measure perplexity, distance to a reference, and tasks."""
    from niwaki.checkpoint import write_text
    from niwaki.evaluation import evaluate as run
    from niwaki.progress import Display

    if json_ is not None and not json_.parent.is_dir():
        raise InputError(f"--json {json_}: the folder {json_.parent} does not exist")
    with Display(err_console) as display:
        result = run(
            model,
            data=data or (),
            tasks=tasks or (),
            reference=reference,
            seq_len=seq_len,
            max_tokens=max_tokens,
            limit=limit,
            field=field,
            device=device,
            dtype=dtype,
            report=display,
        )
    _print_scores(result)
    if json_ is not None:
        write_text(json_, json.dumps(result, indent=2) + "\n")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Continue PROMPT with MODEL."""
    from niwaki.generation import generate as run

    text = run(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, device=device)
    out_console.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method in full.", show_default=False)] = None,
) -> None:
    """List the methods, or describe one with its options."""
    from dataclasses import fields

    from niwaki.methods import METHODS, get_method

    if name is None:
        table = Table("method", "what", "needs", "paper")
        for known in METHODS:
            method = get_method(known)
            what = method.__doc__.split("\n")[0].partition(": ")[2]
            table.add_row(known, what, _needs(method.needs(method.Config())), method.PAPER)
        out_console.print(table)
        return
    method = get_method(name)
    out_console.print(method.__doc__.strip(), markup=False, highlight=False)
    for option in fields(method.Config):
        kind = getattr(option.type, "__name__", option.type)
        out_console.print(f"  --set {option.name}={option.default}  ({kind})", markup=False, highlight=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = Path("niwaki-demo"),
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier demo.")] = False,
) -> None:
    """Compress the embedded sapling to 2:4 and compare it with the dense one, offline."""
    from niwaki.demo import run_demo
    from niwaki.progress import Display

    with Display(err_console) as display:
        found = run_demo(out, overwrite=overwrite, report=display)
    dense_ppl, pruned_ppl = found["perplexity"]
    table = Table("", "dense", f"{found['method']} {found['target']}", title="sapling, 7.3M parameters")
    table.add_row("bytes on disk", f"{found['bytes'][0]:,}", f"{found['bytes'][1]:,}")
    table.add_row("zeros in decoder matrices", "0 %", f"{found['zeros_frac']:.2%}")
    table.add_row("perplexity", f"{dense_ppl:.2f}", f"{pruned_ppl:.2f}")
    table.add_row("KL to dense (nats/token)", "0", f"{found['kl']:.4f}")
    table.add_row("top-1 agreement", "100 %", f"{found['top1_agreement']:.1%}")
    table.add_row("seconds", "", f"{found['seconds_compress']} compress, {found['seconds_evaluate']} evaluate")
    out_console.print(table)
    out_console.print(
        f"{found['tokens']:,} evaluation tokens. Zeros are stored in place, so the bytes stay. Result: {out}",
        highlight=False,
        soft_wrap=True,
    )


def main() -> None:
    """Entry point: niwaki's own errors become one line and exit code 2."""
    try:
        app()
    except NiwakiError as error:
        err_console.print(f"[red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _given(**flags: Any) -> dict[str, Any]:
    """The flags that were set; the others leave the recipe as it is."""
    return {name: value for name, value in flags.items() if value is not None}


def _require(values: dict[str, Any], *names: str) -> None:
    for name in names:
        if name not in values:
            raise InputError(f"--{name} is missing: for example --method sparsegpt --target 2:4 (see `niwaki methods`)")


def _key_values(pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise InputError(f"--set {pair!r}: expected key=value")
        found[key] = value
    return found


def _needs(needs: Any) -> str:
    if needs.gram:
        return "XᵀX per input"
    return "squared norms per input" if needs.sqnorm else "no data"


def _print_record(out: Path, record: dict[str, Any]) -> None:
    result = record["result"]
    out_console.print(
        f"{out}: {result['matrices']} matrices, {result['zeros_frac']:.4%} zeros, {result['bytes']:,} bytes "
        f"(dense {record['model']['bytes']:,}), {record['seconds']} s, "
        f"peak RSS {record['peak_rss_bytes'] / 1e9:.2f} GB",
        highlight=False,
        soft_wrap=True,
    )
    for note in result["notes"]:
        err_console.print(f"[yellow]note:[/] {note} (see {out}/niwaki/blocks.jsonl)", highlight=False)


def _print_scores(result: dict[str, Any]) -> None:
    compared = result["reference"] is not None
    if result["tokens"]:
        table = Table("data", "tokens", "perplexity", *(("dense", "ratio", "KL", "top-1") if compared else ()))
        for path, tokens in result["tokens"].items():
            row = [path, f"{tokens:,}", f"{result['perplexity'][path]:.3f}"]
            if compared:
                dense = result["reference_perplexity"][path]
                ratio = result["perplexity"][path] / dense
                row += [f"{dense:.3f}", f"{ratio:.3f}", f"{result['kl'][path]:.4f}"]
                row.append(f"{result['top1_agreement'][path]:.2%}")
            table.add_row(*row)
        out_console.print(table)
    if result["tasks"]:
        table = Table("task", "items", "accuracy", "normalised", *(("dense", "normalised") if compared else ()))
        for path, found in result["tasks"].items():
            row = [path, str(found["items"]), *_accuracies(found)]
            table.add_row(*row, *(_accuracies(found["reference"]) if compared else ()))
        out_console.print(table)


def _accuracies(found: dict[str, Any]) -> list[str]:
    texts = []
    for name in ("accuracy", "accuracy_norm"):
        error = found[f"{name}_stderr"]
        texts.append(f"{found[name]:.3f}" + ("" if error is None else f" ± {error:.3f}"))
    return texts


if __name__ == "__main__":
    main()
