"""The commands `niwaki adapt` and `niwaki calibrate-gate` for results of contextual methods."""

from pathlib import Path
from typing import Annotated, Any

import typer

from niwaki.cli.options import Bos, Data, Device, Field, SeqLen, check_bos, check_inputs, console, print_warning

Out = Annotated[Path, typer.Argument(help="A result of the method shadow.", show_default=False)]


def calibrate_gate(
    out: Out,
    data: Data = None,
    agreement: Annotated[float, typer.Option(help="Share of tokens on which sparse and dense must agree.")] = 0.9,
    samples: Annotated[int, typer.Option(help="Number of prompts.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens after the prompt that are compared.")] = 64,
    batch: Annotated[
        int, typer.Option(help="Also time batches of N sequences here, to set which batches run dense. 0: do not.")
    ] = 0,
    field: Field = "text",
    bos: Bos = "auto",
    device: Device = "auto",
) -> None:
    """Set the limits beyond which a prompt of OUT runs dense."""
    check_inputs(str(out), data=data, device=device)
    from niwaki.measure.prompt_gate import calibrate_gate as run

    gate = run(
        out, data=data or (), agreement=agreement, samples=samples, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
        batch=batch, field=field, device=device, bos=check_bos(bos), report=print_warning,
    )  # fmt: skip
    lines = [
        f"{out}: prompts that deviate by up to {gate['max_deviation']:.4g} with a margin of at least "
        f"{gate['min_margin']:.3g} run sparse, {gate['sparse_frac']:.0%} of {gate['prompts']}; agreement "
        f"{gate['agreement']:.2%} (all sparse: {gate['agreement_all_sparse']:.2%})"
    ]
    if batch:
        dense, part, choice = (1000 * gate["seconds"][name] for name in ("dense", "part", "choice"))
        lines.append(
            f"{batch} sequences: {dense:.1f} ms a token dense, {part:.1f} ms sparse, {choice:.1f} ms for the choice; "
            f"a batch that needs more than {gate['max_kept_frac']:.0%} of the weights runs dense"
        )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def adapt(
    out: Out,
    data: Data = None,
    samples: Annotated[int, typer.Option(help="Windows of text. One in four is held out.")] = 128,
    seq_len: SeqLen = 512,
    field: Field = "text",
    bos: Bos = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the order of the documents.")] = 0,
    device: Device = "auto",
) -> None:
    """Fit the predictor or the thresholds of OUT again to recent text, and keep the better ones on held-out text."""
    check_inputs(str(out), data=data, device=device)
    from niwaki.compression.adapt import adapt as run

    text: dict[str, Any] = {"data": data or (), "samples": samples, "seq_len": seq_len, "field": field}
    result = run(out, **text, bos=check_bos(bos), seed=seed, device=device, report=print_warning)
    outcome = "replaced, the old one is kept beside it" if result["accepted"] else "kept, the new one was not better"
    if "skipped" in result:
        skipped, divergence = result["skipped"], result["divergence"]
        found = (
            f"skipped {skipped['old']:.1%} -> {skipped['new']:.1%}, wanted {result['wanted']:.1%}; divergence "
            f"{divergence['old']:.4f} -> {divergence['new']:.4f}; list of thresholds"
        )
    else:
        found = f"importance held by what is kept {result['kept']['old']:.4f} -> {result['kept']['new']:.4f}; predictor"
    console.print(
        f"{out}: {found} {outcome}",
        highlight=False,
        soft_wrap=True,
    )
