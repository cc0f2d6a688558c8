"""Commands for results of contextual methods; `cli` puts them under their names."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from niwaki.cli.options import check_given

TEXT = "Text: .txt, .jsonl, .parquet or a data set name. Repeatable."
DEVICE = "auto (CUDA if there is one), cpu, cuda or cuda:N."
Out = Annotated[Path, typer.Argument(help="A result of method shadow.", show_default=False)]
Data = Annotated[list[str] | None, typer.Option(help=TEXT)]
Device = Annotated[str, typer.Option(help=DEVICE)]
console = Console()


def calibrate_gate(
    out: Out,
    data: Data = None,
    agreement: Annotated[float, typer.Option(help="Share of tokens on which sparse and dense are to agree.")] = 0.9,
    samples: Annotated[int, typer.Option(help="Prompts.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens compared behind it.")] = 64,
    batch: Annotated[
        int, typer.Option(help="Also time this machine with so many sequences: from where a batch runs dense.")
    ] = 0,
    device: Device = "auto",
) -> None:
    """Choose on your own text which prompts OUT answers with all of its weights."""
    check_given(str(out), data=data)
    from niwaki.measure.prompt_gate import calibrate_gate as run

    found = run(
        out,
        data=data or (),
        agreement=agreement,
        samples=samples,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        device=device,
    )
    lines = [
        f"{out}: prompts that deviate by up to {found['max_deviation']:.4g} with a margin of at least "
        f"{found['min_margin']:.3g} run sparse, {found['sparse_frac']:.0%} of {found['prompts']}; agreement "
        f"{found['agreement']:.2%} (all sparse: {found['agreement_all_sparse']:.2%})"
    ]
    if batch:
        dense, part, choice = (1000 * found["seconds"][name] for name in ("dense", "part", "choice"))
        lines.append(
            f"{batch} sequences: {dense:.1f} ms a token dense, {part:.1f} ms sparse, {choice:.1f} ms for the choice; "
            f"a batch that needs more than {found['max_kept_frac']:.0%} of the weights runs dense"
        )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def adapt(
    out: Out,
    data: Data = None,
    samples: Annotated[int, typer.Option(help="Windows; a quarter is held out.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed for the order of the documents.")] = 0,
    device: Device = "auto",
) -> None:
    """Learn the predictor of OUT anew from recent text, and keep whichever is better on a part held out."""
    check_given(str(out), data=data)
    from niwaki.compression.adapt import adapt as run

    found = run(out, data=data or (), samples=samples, seq_len=seq_len, seed=seed, device=device)
    kept = found["kept"]
    what = "replaced, the old one is kept beside it" if found["accepted"] else "kept, the new one was not better"
    console.print(
        f"{out}: importance held by what is kept {kept['old']:.4f} -> {kept['new']:.4f}; predictor {what}",
        highlight=False,
        soft_wrap=True,
    )
