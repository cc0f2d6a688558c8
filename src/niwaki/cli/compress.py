"""The command `niwaki compress`, and the line that it prints about a finished result."""

from pathlib import Path
from typing import Annotated, Any

import typer

from niwaki.cli import options
from niwaki.cli.options import check_job, console, error_console, first_given, given, recipe_values
from niwaki.compression.run_record import RunRecord, read_lines
from niwaki.config.targets import format_blocks


def compress(
    model: options.Model,
    out: Annotated[Path, typer.Argument(help="New folder for the result.", show_default=False)],
    method: options.Method = None,
    preset: options.Preset = None,
    target: options.Target = None,
    target_bytes: options.TargetBytes = None,
    blocks: options.Blocks = None,
    keep_blocks: options.KeepBlocks = None,
    allocation: options.Allocation = None,
    calibration: options.Calibration = None,
    field: options.CalibrationField = None,
    samples: options.Samples = None,
    seq_len: options.CalibrationSeqLen = None,
    bos: options.CalibrationBos = None,
    mix: options.Mix = None,
    held_out: options.HeldOut = None,
    recipe: options.RecipeFile = None,
    set_: options.SetOption = None,
    pack: options.Pack = None,
    embeddings: options.Embeddings = None,
    ends: options.OldEnds = None,
    expert_tokens: options.ExpertTokens = None,
    rotate: options.Rotate = None,
    drop_unused: options.DropUnused = False,
    seed: options.Seed = None,
    device: options.RecipeDevice = None,
    dtype: options.RecipeDtype = None,
    batch_tokens: options.BatchTokens = None,
    activation_bytes: options.ActivationBytes = None,
    logit_bytes: options.LogitBytes = None,
    dense_stream: options.DenseStream = False,
    merge_adapter: options.MergeAdapter = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a result of niwaki at OUT after the new one is complete.")
    ] = False,
) -> None:
    """Compress MODEL into OUT, block by block."""
    from niwaki.compression.places import check_free, place_of

    files = tuple(calibration) if calibration else None
    text = given(
        files=files, field=field, samples=samples, seq_len=seq_len, bos=bos, mix=mix or None, held_out=held_out
    )
    values = recipe_values(
        recipe, text, set_,
        method=method, preset=preset, target=target, target_bytes=target_bytes, blocks=blocks,
        keep_blocks=keep_blocks, allocation=allocation, pack=pack, embeddings=first_given(embeddings, ends),
        expert_tokens=expert_tokens, rotate=rotate, drop_unused=drop_unused or None, seed=seed, device=device,
        dtype=dtype, batch_tokens=batch_tokens, activation_bytes=activation_bytes, logit_bytes=logit_bytes,
    )  # fmt: skip
    check_free(place_of(out), resume=resume, overwrite=overwrite)
    check_job(None if merge_adapter else model, values, place_of(out))
    _run(model, out, values, resume=resume, overwrite=overwrite, dense_stream=dense_stream, merge_adapter=merge_adapter)


def _run(model: str, out: Path, values: dict[str, Any], **flags: bool) -> None:
    """Compress with progress on standard error, and print a summary. Say after Ctrl-C whether a run can resume."""
    from niwaki.cli.progress import Display
    from niwaki.compression.compress import compress as run
    from niwaki.compression.places import keeps_parts, place_of

    try:
        with Display(error_console) as display:
            record = run(model, out, report=display, **flags, **values)
    except KeyboardInterrupt:
        kept = "finished blocks are kept, repeat the same command with --resume"
        kept = kept if keeps_parts(place_of(out)) else "nothing was finished, nothing is kept"
        error_console.print(f"interrupted: {kept}")
        raise typer.Exit(130) from None
    _print_record(out, RunRecord.model_validate(record))


def _skipped(predictor: dict[str, Any]) -> str:
    """Return what a contextual result skips, and what that costs where a trial said it."""
    share = predictor["skipped_frac"]
    if predictor.get("unit") != "inputs":
        return f"{share:.0%} of heads and neurons skipped for each prompt"
    return f"{share:.0%} of the weights not read by a token, {predictor['ratio']:.3g} times the perplexity"


def _print_record(out: Path, record: RunRecord) -> None:
    """Print matrices, bits or zeros, bytes, time and peak memory of a result, then its notes."""
    result, coded = record.result, record.asks_for_bits
    own = result.named or result
    codes = f", {own.bits:.3f} true bits a weight in {own.packed} of them" if own.packed else ""
    if coded and not codes:
        counted = own.bits if own.method_bits is None else own.method_bits
        codes = f", {counted:.3f} true bits a weight by the method's count, stored as plain weights"
    codes += "" if result.embeddings_bits is None else f", {result.embeddings_bits:.3f} in embeddings and head"
    zeros = "" if coded else f", {own.zeros_frac:.4%} zeros"
    if record.shaping and (removed := record.shaping.removed_frac):
        zeros = f", {removed:.2%} of the blocks removed" + (zeros if result.zeros_frac else "")
    if result.predictor is not None:
        zeros = f", {_skipped(result.predictor)}"
    where = whole = ""
    if result.named is not None:
        where = f" of blocks {format_blocks(result.named.blocks)}"
        whole = f", {result.bits:.3f} bits and {result.zeros_frac:.4%} zeros in all {result.matrices} matrices"
    console.print(
        f"{out}: {own.matrices} matrices{where}{codes}{zeros}{whole}, {result.bytes:,} bytes "
        f"(dense {record.origin.dense_bytes:,}), {record.seconds} s, "
        f"peak RSS {record.peak_rss_bytes / 1e9:.2f} GB",
        highlight=False,
        soft_wrap=True,
    )
    lines = read_lines(out) if result.notes else []
    for note in result.notes:
        noted = len({line.block for line in lines if line.note == note})
        where = f"{noted} of {len({line.block for line in lines})} blocks, see {out}/niwaki/blocks.jsonl"
        error_console.print(f"[yellow]note:[/] {note} ({where})", highlight=False)
