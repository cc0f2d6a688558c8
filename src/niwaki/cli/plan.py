"""The command `niwaki plan`, and its tables."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from niwaki.cli import options
from niwaki.cli.options import check_job, console, first_given, given, print_line, recipe_values
from niwaki.cli.tables import print_table
from niwaki.config.targets import format_blocks

PHASES = {
    "walk": "compressing the blocks",
    "scans": "first scan of the dense blocks",
    "trials": "evaluation of candidate shapes",
    "gradients": "gradients",
    "embeddings": "embeddings and LM head",
    "text": "text",
    "opening": "opening the model, as measured just now",
}
Machine = Annotated[
    str | None,
    typer.Option(
        help="Machine to plan for: h100, h200, a100, 4090, or cpu for the CPU of this one. Default: this machine."
    ),
]
MIN_SHARE = 0.02  # phases below this share of the time have no row


def plan(
    model: options.Model,
    method: options.Method = None,
    preset: options.Preset = None,
    target: options.Target = None,
    target_bytes: options.TargetBytes = None,
    blocks: options.Blocks = None,
    keep_blocks: options.KeepBlocks = None,
    allocation: options.Allocation = None,
    calibration: options.Calibration = None,
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
    dtype: options.RecipeDtype = None,
    batch_tokens: options.BatchTokens = None,
    activation_bytes: options.ActivationBytes = None,
    logit_bytes: options.LogitBytes = None,
    dense_stream: options.DenseStream = False,
    merge_adapter: options.MergeAdapter = False,
    gpu: Machine = None,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Price of the machine, in any currency. Costs are in the same currency.")
    ] = None,
    tokens_per_day: Annotated[float | None, typer.Option(help="Tokens that the model generates in a day.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the result, to check the free space there.")] = None,
    json_: options.PrintJson = False,
) -> None:
    """Predict time, memory, bytes, decode speed and cost of a compression. Refuse a recipe that cannot work."""
    text = given(samples=samples, seq_len=seq_len, bos=bos, mix=mix or None, held_out=held_out)
    values = recipe_values(
        recipe, text | given(files=tuple(calibration or ()) or None), set_,
        method=method, preset=preset, target=target, target_bytes=target_bytes, blocks=blocks,
        keep_blocks=keep_blocks, allocation=allocation, pack=pack, embeddings=first_given(embeddings, ends),
        expert_tokens=expert_tokens, rotate=rotate, drop_unused=drop_unused or None, dtype=dtype,
        batch_tokens=batch_tokens, activation_bytes=activation_bytes, logit_bytes=logit_bytes,
    )  # fmt: skip
    base = None if merge_adapter else model
    check_job(base, values, out and out.absolute(), reads_text=False, here=gpu in (None, "cpu"))
    from niwaki.compression.plan.planner import plan as run

    values |= {"price_per_hour": price_per_hour, "tokens_per_day": tokens_per_day, "dense_stream": dense_stream}
    result = run(model, gpu=gpu, out=out, merge_adapter=merge_adapter, **values)
    if json_:
        typer.echo(json.dumps(result, indent=2))
    else:
        print_plan(console, result)


def print_plan(to: Console, result: dict[str, Any]) -> None:
    """Print the result of `niwaki.plan`: model, recipe and machine, then its tables."""
    model, recipe, machine = result["model"], result["recipe"], result["machine"]
    target = recipe["target"] or (f"{recipe['target_bytes']:,} bytes" if recipe["target_bytes"] else "")
    about = (
        "measured now" if machine["measured"] else "published rates times the share that we reached on H100 and H200"
    )
    print_line(f"{model['type']}, {model['blocks']} blocks, {_count(model['weights'])} weights", to)
    where = f" in blocks {format_blocks(named)}" if (named := recipe.get("blocks")) else ""
    print_line(f"{recipe['method']} {target}{where} on {machine['name']} ({about})", to)
    towers = sum(result["towers"].values())
    share, before = (
        result["output_bytes"] / model["bytes"],
        8 * (model["bytes"] - result["unread"]["bytes"] - towers) / max(model["weights"], 1),
    )
    unread, kept = result["unread"]["bytes"], result["unread"]["kept"]
    rows = [
        ["weight files", f"{_bytes(result['output_bytes'])} of {_bytes(model['bytes'])} ({share:.1%})"],
        ["bits a weight in the matrices of the blocks, with scales", f"{result['matrix_bits']:.2f}"],
        ["bits a weight in the files, embeddings and head included", f"{result['output_bits']:.2f} of {before:.2f}"],
        *_kept(result["kept_dense"]),
        *([["towers that text alone does not run, copied unchanged", _bytes(towers)]] if towers else []),
        *([["tensors outside the model, copied unchanged", _bytes(unread)]] if unread and kept else []),
        ["time", f"about {_time(result['seconds'])}"],
        *_phases(result),
        ["peak memory of the process", _bytes(result["peak_rss_bytes"])],
    ]
    if result["peak_device_bytes"]:
        rows.append(["peak memory of the device", _bytes(result["peak_device_bytes"])])
    rows.append(["disk while it runs", _bytes(result["disk_bytes"])])
    print_table(to, ["compression", "predicted"], rows)
    _print_decode(to, result["decode"])
    if result["money"] is not None:
        _print_money(to, result["money"])
        for name in ("before", "after"):
            if not result["decode"][name]["fits"]:
                print_line(f"no cost of a day: the model {name} does not fit one {machine['name']}", to)
    if not recipe["calibration"]["files"] and "walk" in result["seconds_by_phase"]:
        print_line("note: without --calibration, methods that need text generate it first; the time includes that", to)
    for text in result["warnings"]:
        print_line(f"warning: {text}", to)


def _kept(kept: dict[str, Any]) -> list[list[str]]:
    """Return a row for all weights that stay dense, and one for each."""
    if not kept["weights"]:
        return []
    rows = [["weights of the blocks that stay dense", f"{_bytes(kept['bytes'])} ({kept['share']:.2%} of the blocks)"]]
    for name, weight in kept["weights"].items():
        rows.append([f"  {name} ({weight['reason']})", f"{_bytes(weight['bytes'])} in {weight['blocks']} blocks"])
    return rows


def _phases(result: dict[str, Any]) -> list[list[str]]:
    """Return a row for each phase that takes at least MIN_SHARE of the time, the longest first."""
    by_phase = result["seconds_by_phase"].items()
    named = sorted((one for one in by_phase if one[1] >= MIN_SHARE * result["seconds"]), key=lambda one: -one[1])
    return [[f"  of that {PHASES[name]}", _time(seconds)] for name, seconds in named]


def _print_decode(to: Console, decode: dict[str, Any]) -> None:
    rows = []
    for name in ("before", "after"):
        own = decode[name]
        reached = own["reached_tokens_per_s"]
        reached_text = "" if own["fits"] else f"does not fit {decode['machine']}: "
        reached_text += (
            "not measured" if reached is None else f"{_figures(reached)} ({own['reached_share']:.0%} of the ceiling)"
        )
        rows.append([name, _bytes(own["bytes_per_token"]), _figures(own["ceiling_tokens_per_s"]), reached_text])
    headers = ["decode, one sequence", "read per token", "tokens/s, ceiling", "tokens/s, our kernels"]
    print_table(to, headers, rows)
    gained = decode["speedup_reached"]
    rate = f"{_figures(decode['bandwidth_bytes_per_s'] / 1e9)} GB/s"
    text = f"ceiling: the time to read the bytes of a token at {rate}, and no other work. Small models stay far below. "
    text += f"Max speedup {decode['speedup_ceiling']:.2f}"
    source = f", from {decode['source']}" if decode["source"] else ""
    print_line(text + ("" if gained is None else f"; {gained:.2f} at the speed that our kernels reached{source}"), to)


def _print_money(to: Console, money: dict[str, Any]) -> None:
    """Print the cost of the compression, then the cost of one day of tokens."""
    rows = [["compressing, once", _cost(money["compress"])]]
    for name, speed in (("ceiling", "at the ceilings"), ("reached", "at the speed of our kernels")):
        if own := money.get(name):
            back = own["days_to_earn_back"]
            tokens = f"{_figures(money['tokens_per_day'])} tokens a day {speed}"
            rows += [[f"{tokens}, {when}", _cost(own[f"{when}_per_day"])] for when in ("before", "after", "saved")]
            rows.append(
                ["  earned back in", "never: nothing is saved" if back is None else f"{_figures(back, 2)} days"]
            )
    price = _figures(money["price_per_hour"])
    print_table(to, [f"cost, in the currency of {price} an hour", "predicted"], rows)
    if len(rows) > 1:
        print_line("one sequence is decoded at a time", to)


def _figures(value: float, digits: int = 3) -> str:
    """Round to significant digits, filled with zeros, without an exponent."""
    if not value:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(places, 0)}f}"


def _cost(value: float) -> str:
    """Return a cost with two decimals. A smaller one is not shown as zero."""
    return "less than 0.01" if 0 < abs(value) < 0.005 else f"{value:,.2f}"


def _count(weights: int) -> str:
    unit, size = next(((u, s) for u, s in (("billion", 1e9), ("million", 1e6)) if weights >= s), ("", 1.0))
    return f"{_figures(weights / size)} {unit}".strip()


def _bytes(count: float) -> str:
    unit, size = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= s), ("bytes", 1.0))
    return f"{_figures(count / size)} {unit}" if size > 1 else f"{count:,.0f} bytes"


def _time(seconds: float) -> str:
    """Return a time with two digits, because a prediction may be wrong by half."""
    if seconds < 120:
        return f"{_figures(seconds, 2)} s"
    return f"{_figures(seconds / 60, 2)} min" if seconds < 7200 else f"{_figures(seconds / 3600, 2)} h"
