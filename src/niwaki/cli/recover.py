"""The command `niwaki recover`: training of a compressed model to compute what its dense model does."""

from pathlib import Path
from typing import Annotated, Any

import typer

from niwaki.cli import options
from niwaki.cli.options import check_bos, check_inputs, console, error_console
from niwaki.config.sources import parse_mix
from niwaki.config.targets import parse_count
from niwaki.errors import InputError

Text = Annotated[list[str] | None, typer.Option("--calibration", "--data", help=options.TEXT_HELP, show_default=False)]
Teacher = Annotated[
    str | None,
    typer.Option(help="Dense model to learn from; none learns the next token of the text. Default: that of MODEL."),
]
Tokens = Annotated[str, typer.Option(help="Tokens that training reads: 300k, 1M. Shorter text is repeated.")]
Train = Annotated[
    str,
    typer.Option(
        help="What is learned: weights (codes too), low-rank (less memory), scales (of codes), or auto: weights if "
        "they fit. Norms and biases always.",
        metavar="auto|weights|low-rank|scales",
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(help="Learning rate, relative to the size of each matrix. Default: 0.001 to 0.01, by the steps."),
]
Batch = Annotated[int | None, typer.Option(help="Windows per step. Default: 2,048 to 32,768 tokens, by --tokens.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps, in place of --tokens.")]


def recover(
    model: options.Model,
    out: Annotated[
        Path | None,
        typer.Argument(help="Folder for the result. Without it: MODEL-recovered.", show_default=False),
    ] = None,
    calibration: Text = None,
    mix: options.Mix = None,
    teacher: Teacher = None,
    tokens: Tokens = "1M",
    train: Train = "auto",
    rank: Annotated[int, typer.Option(help="Rank of low-rank training.")] = 16,
    rate: Rate = None,
    batch: Batch = None,
    steps: Steps = None,
    seq_len: options.SeqLen = 512,
    bos: options.Bos = "auto",
    field: options.Field = "text",
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 0,
    device: options.Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a result of niwaki at OUT.")] = False,
) -> None:
    """Train a compressed MODEL to compute what its dense model does. Zeros and codes keep their form."""
    if not (calibration or mix):
        raise InputError("no text to train on: give --calibration FILE, or --mix self:1 for text of the model itself")
    check_inputs(model, *([teacher] if teacher and teacher != "none" else []), data=calibration, device=device)
    parse_mix(mix or (), calibration or ())
    amount = parse_count(tokens)
    policy = check_bos(bos)
    from niwaki.cli.progress import Display
    from niwaki.compression.recover import recover as run

    out = out or Path(f"{model.rstrip('/')}-recovered")
    training: dict[str, Any] = {"train": train, "rank": rank, "rate": rate, "batch": batch, "steps": steps}
    text: dict[str, Any] = {"data": calibration or (), "mix": mix or (), "field": field, "seq_len": seq_len}
    with Display(error_console) as display:
        record = run(
            model, out, teacher=teacher, tokens=amount, **text, **training, bos=policy, seed=seed, device=device,
            resume=resume, overwrite=overwrite, report=display,
        )  # fmt: skip
    result = record["result"]
    losses = f"held-out loss {result['heldout_loss_before']:.4f} -> {result['heldout_loss']:.4f}"
    kept = [f"{result['zeros_frac']:.4%} zeros kept"] if result["zeros"] else []
    kept += [f"codes of {result['packed_bits']} bits"] if result.get("packed_bits") else []
    parts = [losses, *kept, f"{result['steps']} steps", f"{record['seconds']} s"]
    console.print(f"{out}: {', '.join(parts)}", highlight=False, soft_wrap=True)
