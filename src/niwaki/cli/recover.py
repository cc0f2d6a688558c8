"""The command `niwaki recover`: training of a pruned model through low-rank adapters."""

from pathlib import Path
from typing import Annotated, Any

import typer

from niwaki.cli.options import Bos, Data, Device, Field, Model, SeqLen, check_bos, check_inputs, console, error_console
from niwaki.errors import InputError


def recover(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Argument(help="Folder for the result. Without it: MODEL-recovered.", show_default=False),
    ] = None,
    data: Data = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 5e-4,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 4,
    samples: Annotated[int, typer.Option(help="Windows of text. One in eight is held out.")] = 256,
    seq_len: SeqLen = 512,
    bos: Bos = "auto",
    field: Field = "text",
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 0,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a result of niwaki at OUT.")] = False,
) -> None:
    """Train a pruned MODEL on text through low-rank adapters, and merge them with every zero kept."""
    if not data:
        raise InputError("no text to train on: give --data FILE")
    check_inputs(model, data=data)
    from niwaki.cli.progress import Display
    from niwaki.compression.recover import recover as run

    out = out or Path(f"{model.rstrip('/')}-recovered")
    training: dict[str, Any] = {"rank": rank, "rate": rate, "steps": steps, "batch": batch, "seed": seed}
    text: dict[str, Any] = {"data": data, "field": field, "samples": samples, "seq_len": seq_len}
    text["bos"] = check_bos(bos)
    with Display(error_console) as display:
        record = run(model, out, **text, **training, device=device, overwrite=overwrite, report=display)
    result = record["result"]
    losses = f"held-out loss {result['heldout_loss_before']:.4f} -> {result['heldout_loss']:.4f}"
    zeros = f"{result['zeros_frac']:.4%} zeros kept"
    console.print(f"{out}: {losses}, {zeros}, {record['seconds']} s", highlight=False, soft_wrap=True)
