"""The command line: parse → config → call. Heavy imports happen inside the commands."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from niwaki.cli import (
    bench as bench_commands,
)
from niwaki.cli import (
    compare as comparing_commands,
)
from niwaki.cli import (
    contextual as contextual_commands,
)
from niwaki.cli import (
    evaluate as evaluation_commands,
)
from niwaki.cli import (
    inspect as inspect_commands,
)
from niwaki.cli import (
    plan as plan_commands,
)
from niwaki.cli import (
    rollout as rollout_commands,
)
from niwaki.cli import (
    serve as serving_commands,
)
from niwaki.cli.options import check_given, check_recipe, given, recipe_values
from niwaki.compression.run import shaping_of
from niwaki.config.recipe import asks_for_bits
from niwaki.errors import InputError, NiwakiError
from niwaki.version import __version__

app = typer.Typer(
    name="niwaki",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out_console = Console()
err_console = Console(stderr=True)

TEXT = "Text: .txt, .jsonl, .parquet or a data set name."
DEVICE = "auto (CUDA if there is one), cpu, cuda or cuda:N."
DTYPE = "Arithmetic: auto (float32 on the CPU, else as stored), float32, bfloat16 or float16."
TARGET = "Zeros 0.5, 50%, 2:4, bits 4bit, 1.75bit, or 2:4+4bit of a chain. Required here or in the recipe."
TARGET_BYTES = "Instead of a target: bytes of all matrices together, 1.7GB or 800MiB (squeeze10)."
KEEP_BLOCKS = "Blocks that stay at 4 bits while the others make up for it: auto, none or 0,7 (squeeze10)."


def _option(text: str, default: object) -> Any:
    """An option that is None when not given, because a recipe may set it; its help shows the final default."""
    return typer.Option(help=f"{text} [dim]\\[default: {default}][/]")


def _print_version(wanted: bool) -> None:
    if wanted:
        out_console.print(f"niwaki {__version__}", highlight=False)
        raise typer.Exit


Model = Annotated[str, typer.Argument(help="A local model folder or a hub id.", show_default=False)]


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Make pretrained language models smaller and faster after training, and prove what that cost."""


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(help="New folder for the result.", show_default=False)],
    method: Annotated[
        str | None, typer.Option(help="See `niwaki methods`; chains as `besa+wandapp`. Required, or a preset.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="fast, balanced or best instead of a method.")] = None,
    target: Annotated[str | None, typer.Option(help=TARGET)] = None,
    target_bytes: Annotated[str | None, typer.Option(help=TARGET_BYTES)] = None,
    keep_blocks: Annotated[str | None, _option(KEEP_BLOCKS, "none")] = None,
    allocation: Annotated[
        str | None, _option("uniform, owl (zeros), searched (structured), sensitivity (bits) or auto.", "auto")
    ] = None,
    calibration: Annotated[
        list[str] | None, _option(f"{TEXT} Repeatable.", "text the model writes itself, which is slow")
    ] = None,
    field: Annotated[str | None, _option("Text field of .jsonl and .parquet rows.", "text")] = None,
    samples: Annotated[int | None, _option("Calibration windows.", 128)] = None,
    seq_len: Annotated[int | None, _option("Tokens per window.", 2048)] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML with any of these; flags win.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Method option key=value. Repeatable.")] = None,
    pack: Annotated[str | None, _option("Store codes as codes: codes, auto (nonzeros too) or none.", "codes")] = None,
    embeddings: Annotated[str | None, _option("Embeddings and head as codes too: none, 4bit or 8bit.", "none")] = None,
    ends: Annotated[str | None, typer.Option("--ends", hidden=True)] = None,
    seed: Annotated[int | None, _option("Seed.", 0)] = None,
    device: Annotated[str | None, _option(DEVICE, "auto")] = None,
    dtype: Annotated[str | None, _option(DTYPE, "auto")] = None,
    batch_tokens: Annotated[int | None, _option("Tokens per forward.", "2048 on the CPU, 16384 on CUDA")] = None,
    activation_bytes: Annotated[
        int | None,
        _option("Most bytes of hidden states to keep in memory before a mapped file is used.", "half of what is free"),
    ] = None,
    dense_stream: Annotated[
        bool, typer.Option("--dense-stream", help="Also follow the dense model: drift per depth.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an OUT that niwaki wrote, once the new result is complete.")
    ] = False,
) -> None:
    """Compress MODEL into OUT, block by block."""
    from niwaki.compression.run import check_free, partial_of, resumable

    values = recipe_values(
        recipe,
        given(files=tuple(calibration) if calibration else None, field=field, samples=samples, seq_len=seq_len),
        set_,
        **given(method=method, preset=preset, target=target, target_bytes=target_bytes, keep_blocks=keep_blocks),
        **given(allocation=allocation, pack=pack, embeddings=embeddings or ends, seed=seed, device=device, dtype=dtype),
        **given(batch_tokens=batch_tokens, activation_bytes=activation_bytes),
    )
    check_recipe(values)
    check_given(model)
    check_free(out.absolute(), partial_of(out.absolute()), resume=resume, overwrite=overwrite)
    from niwaki.cli.progress import Display
    from niwaki.compression.compress import compress as run

    try:
        with Display(err_console) as display:
            record = run(
                model, out, resume=resume, overwrite=overwrite, dense_stream=dense_stream, report=display, **values
            )
    except KeyboardInterrupt:
        kept = "finished blocks are kept, go on with the same command and --resume"
        err_console.print(f"interrupted: {kept if resumable(out) else 'nothing was finished, nothing is kept'}")
        raise typer.Exit(130) from None
    _print_record(out, record)


@app.command()
def recover(
    model: Model,
    out: Annotated[
        Path | None, typer.Argument(help="Folder for the result; MODEL-recovered if left out.", show_default=False)
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help=f"{TEXT} Repeatable.")] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 5e-4,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 200,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 4,
    samples: Annotated[int, typer.Option(help="Windows; an eighth is held out.")] = 256,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    field: Annotated[str, typer.Option(help="Text field of .jsonl and .parquet rows.")] = "text",
    seed: Annotated[int, typer.Option(help="Seed for everything random.")] = 0,
    device: Annotated[str, typer.Option(help=DEVICE)] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an OUT that niwaki wrote.")] = False,
) -> None:
    """Train a pruned MODEL on text through low-rank adapters, merged with every zero kept."""
    if not data:
        raise InputError("no text to train on: give --data FILE")
    check_given(model, data=data)
    from niwaki.cli.progress import Display
    from niwaki.compression.recover import recover as run

    out = out or Path(f"{model.rstrip('/')}-recovered")
    with Display(err_console) as display:
        record = run(
            model,
            out,
            data=data,
            field=field,
            rank=rank,
            rate=rate,
            steps=steps,
            batch=batch,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            overwrite=overwrite,
            report=display,
        )
    result = record["result"]
    losses = f"held-out loss {result['heldout_loss_before']:.4f} -> {result['heldout_loss']:.4f}"
    zeros = f"{result['zeros_frac']:.4%} zeros kept"
    out_console.print(f"{out}: {losses}, {zeros}, {record['seconds']} s", highlight=False, soft_wrap=True)


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="A result of niwaki, or any model folder.", show_default=False)],
    dest: Annotated[Path, typer.Argument(help="New folder for the export.", show_default=False)],
    to: Annotated[str, typer.Option(help="gguf, onnx or compressed-tensors (4 and 8 bits of rtn and gptq).")],
    type_: Annotated[
        str | None,
        typer.Option("--type", help="Matrices in gguf: f32, bf16, q8_0, q4_0 ...; f16 if left out."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a DEST that niwaki wrote.")] = False,
) -> None:
    """Write OUT to DEST in the format of other engines."""
    check_given(str(out))
    from niwaki.cli.progress import Display
    from niwaki.exporters.export import export as run

    with Display(err_console) as display:
        record = run(out, dest, to=to, type=type_, overwrite=overwrite, report=display)
    found = record["export"]
    written = f"{found['to']} {found['format']}, {found['bits']:.3f} true bits a weight, {found['bytes']:,} bytes"
    out_console.print(f"{dest}: {written}, {found['seconds']} s", highlight=False, soft_wrap=True)
    for note in found.get("notes", ()):
        err_console.print(f"[yellow]note:[/] {_escape(note)}", highlight=False, soft_wrap=True)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    verify: Annotated[
        int, typer.Option(help="Contextual models: every so many tokens the full model checks and corrects.")
    ] = 0,
    device: Annotated[str, typer.Option(help=DEVICE)] = "auto",
) -> None:
    """Continue PROMPT with MODEL."""
    check_given(model)
    from niwaki.runtime.load import generate as run

    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "verify": verify}
    text = run(model, prompt, device=device, **settings)  # type: ignore[arg-type]
    out_console.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method in full.", show_default=False)] = None,
) -> None:
    """List the methods, or describe one with its options."""
    from niwaki.cli.tables import print_method, print_methods

    if name is None:
        print_methods(out_console)
    else:
        print_method(out_console, name)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = Path("niwaki-demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo.")] = False,
) -> None:
    """Compress the embedded sapling to 2:4 and compare it with the dense one, offline."""
    from niwaki.cli.demo import run_demo
    from niwaki.cli.progress import Display
    from niwaki.cli.tables import print_demo

    with Display(err_console) as display:
        found = run_demo(out, overwrite=overwrite, report=display)
    print_demo(out_console, found, out)


app.command()(evaluation_commands.evaluate)
app.command()(bench_commands.bench)
app.command()(comparing_commands.compare)
app.command()(comparing_commands.gate)
app.command()(contextual_commands.adapt)
app.command()(contextual_commands.calibrate_gate)
app.command()(inspect_commands.inspect)
app.command()(plan_commands.plan)
app.add_typer(rollout_commands.app, name="rollout")
app.command()(serving_commands.serve)


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


def _print_record(out: Path, record: dict[str, Any]) -> None:
    result, coded = record["result"], asks_for_bits(record)
    codes = f", {result['bits']:.3f} true bits a weight in {result['packed']} of them" if result.get("packed") else ""
    if coded and not codes:
        counted = result.get("method_bits", result["bits"])
        codes = f", {counted:.3f} true bits a weight by the method's count, stored as plain weights"
    codes += f", {result['ends_bits']:.3f} in embeddings and head" if "ends_bits" in result else ""
    zeros = "" if coded else f", {result['zeros_frac']:.4%} zeros"
    if shaped := shaping_of(record).get("removed_frac"):
        zeros = f", {shaped:.2%} of the blocks gone" + (zeros if result["zeros_frac"] else "")
    if "predictor" in result:
        zeros = f", {result['predictor']['skipped_frac']:.0%} of heads and neurons skipped by input"
    out_console.print(
        f"{out}: {result['matrices']} matrices{codes}{zeros}, {result['bytes']:,} bytes "
        f"(dense {record['model']['bytes']:,}), {record['seconds']} s, "
        f"peak RSS {record['peak_rss_bytes'] / 1e9:.2f} GB",
        highlight=False,
        soft_wrap=True,
    )
    for note in result["notes"]:
        err_console.print(f"[yellow]note:[/] {note} (see {out}/niwaki/blocks.jsonl)", highlight=False)
