"""The command that tells what a compression will take and give; `cli` puts it under its name."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from niwaki.cli.options import check_given, check_recipe, given, recipe_values

console = Console()
Gpu = Annotated[
    str | None, typer.Option(help="h100, h200, a100, 4090, or cpu: this machine. Default: what this machine has.")
]


def plan(
    model: Annotated[str, typer.Argument(help="A local model folder or a hub id.", show_default=False)],
    method: Annotated[str | None, typer.Option(help="See `niwaki methods`. Required, or a preset.")] = None,
    preset: Annotated[str | None, typer.Option(help="fast, balanced or best instead of a method.")] = None,
    target: Annotated[str | None, typer.Option(help="As of `compress`: 0.5, 2:4, 4bit, 2:4+4bit of a chain.")] = None,
    target_bytes: Annotated[str | None, typer.Option(help="Instead of a target: bytes of all matrices.")] = None,
    keep_blocks: Annotated[str | None, typer.Option(help="Blocks that stay at 4 bits: auto, none or 0,7.")] = None,
    allocation: Annotated[str | None, typer.Option(help="uniform, owl, searched, sensitivity or auto.")] = None,
    calibration: Annotated[
        list[str] | None, typer.Option(help="Text; without any, the model writes its own, which is slow.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows. [dim]\\[default: 128][/]")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per window. [dim]\\[default: 2048][/]")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML with any of these; flags win.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Method option key=value. Repeatable.")] = None,
    pack: Annotated[str | None, typer.Option(help="Store codes as codes: codes, auto (nonzeros too) or none.")] = None,
    embeddings: Annotated[str | None, typer.Option(help="Embeddings and head as codes: none, 4bit or 8bit.")] = None,
    ends: Annotated[str | None, typer.Option("--ends", hidden=True)] = None,
    dtype: Annotated[str | None, typer.Option(help="Arithmetic: auto, float32, bfloat16 or float16.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens per forward.")] = None,
    activation_bytes: Annotated[int | None, typer.Option(help="Most bytes of hidden states in memory.")] = None,
    dense_stream: Annotated[bool, typer.Option("--dense-stream", help="Also follow the dense model.")] = False,
    gpu: Gpu = None,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Of the machine, in any currency; costs are in the same.")
    ] = None,
    tokens_per_day: Annotated[float | None, typer.Option(help="Tokens the model is to write in a day.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the result would go, to check the room there.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> None:
    """Predict time, memory, bytes, decode speed and cost of a compression; refuse what cannot work."""
    values = recipe_values(
        recipe,
        given(files=tuple(calibration) if calibration else None, samples=samples, seq_len=seq_len),
        set_,
        method=method,
        preset=preset,
        target=target,
        target_bytes=target_bytes,
        keep_blocks=keep_blocks,
        allocation=allocation,
        pack=pack,
        embeddings=embeddings or ends,
        dtype=dtype,
        batch_tokens=batch_tokens,
        activation_bytes=activation_bytes,
    )
    check_recipe(values)
    check_given(model)
    from niwaki.cli.plan_tables import print_plan
    from niwaki.compression.plan.planner import plan as run

    found = run(
        model,
        gpu=gpu,
        out=out,
        price_per_hour=price_per_hour,
        tokens_per_day=tokens_per_day,
        dense_stream=dense_stream,
        **values,
    )
    if json_:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_plan(console, found)
