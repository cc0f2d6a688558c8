"""The command `niwaki rotate`: another basis for a model, in which compression loses less."""

from pathlib import Path
from typing import Annotated, Any

import typer

from niwaki.cli.options import Bos, Calibration, Device, Field, Model, SeqLen, check_bos, check_inputs, error_console
from niwaki.cli.options import console as out_console
from niwaki.config.targets import WRITTEN_TARGETS_HELP, parse_target
from niwaki.errors import InputError


def rotate(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder for the model in its new basis.", show_default=False)],
    target: Annotated[
        str, typer.Option(help=f"What the result will be compressed to. {WRITTEN_TARGETS_HELP}", show_default=False)
    ],
    calibration: Calibration = None,
    residual: Annotated[
        str, typer.Option(help="Basis of the residual stream: learned, hadamard or none. A tied head is untied.")
    ] = "learned",
    heads: Annotated[
        str, typer.Option(help="Basis of the values of each head: learned, hadamard or none.")
    ] = "learned",
    neurons: Annotated[bool, typer.Option(help="Order the neurons for N:M targets.")] = True,
    scales: Annotated[bool, typer.Option("--scales", help="Scale channels so that rounding loses less (AWQ).")] = False,
    steps: Annotated[int, typer.Option(help="Steps that a learned basis takes.")] = 300,
    rate: Annotated[float, typer.Option(help="Rate of these steps.")] = 0.01,
    samples: Annotated[int, typer.Option(help="Windows of text that importance is measured on.")] = 64,
    seq_len: SeqLen = 512,
    bos: Bos = "auto",
    field: Field = "text",
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 0,
    device: Device = "auto",
) -> None:
    """Write MODEL in another basis that computes the same and loses less when it is compressed."""
    if not calibration:
        raise InputError("no text to measure importance on: give --calibration FILE")
    parse_target(target)
    check_inputs(model, data=calibration, device=device)
    from niwaki.cli.progress import Display
    from niwaki.compression.rotate import rotate as run

    ways: dict[str, Any] = {
        "residual": residual,
        "heads": heads,
        "neurons": neurons,
        "scales": scales,
        "steps": steps,
        "rate": rate,
    }
    text: dict[str, Any] = {"calibration": calibration, "field": field, "samples": samples, "seq_len": seq_len}
    text["bos"] = check_bos(bos)
    with Display(error_console) as display:
        record = run(model, out, target=target, **text, **ways, seed=seed, device=device, report=display)
    result = record["result"]
    lost = ", ".join(f"{name} {before:.4f} -> {after:.4f}" for name, (before, after) in result["lost"].items())
    size = f"{record['bytes'] / 1e6:,.1f} MB" + (
        f", {record['model']['bytes'] / 1e6:,.1f} before the head was untied" * result["untied"]
    )
    line = f"{out}: lost share of importance {lost}; logits within {result['logit_error']:.1e}; {size}"
    out_console.print(f"{line}; {record['seconds']} s", highlight=False, soft_wrap=True)
