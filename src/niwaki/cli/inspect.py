"""The command `niwaki inspect`: tables, a heatmap over depth, error growth. Colour needs a terminal."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from niwaki.cli import options
from niwaki.cli.heatmap import BARS, cells, fewer, print_heatmap
from niwaki.cli.options import PrintJson, console, print_line
from niwaki.cli.tables import print_table
from niwaki.errors import InputError

ERROR = "error: relative loss of an output on the calibration text, ‖changed − dense‖² / ‖dense‖²; 0 is none, 1 is all"
RUNNING_OF_INPUTS = ("refresh_tokens", "min_prompt", "max_deviation")  # other settings are for units of a prompt
TITLES = {"zeros_frac": "zeros", "bits": "bits a weight", "removed_frac": "removed", "run_frac": "run"}


def inspect(
    out: Annotated[
        Path,
        typer.Argument(help="A result of `niwaki compress`; with --sensitivity a dense model.", show_default=False),
    ],
    why: Annotated[
        str | None, typer.Option(help="One matrix in full, for example model.layers.3.mlp.down_proj.")
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Measure which blocks and matrices of a dense model bear what.")
    ] = False,
    calibration: options.Calibration = None,
    field: options.CalibrationField = None,
    samples: Annotated[int | None, options.recipe_option("Number of calibration windows.", 32)] = None,
    seq_len: Annotated[int | None, options.recipe_option(options.SEQ_LEN_HELP, 512)] = None,
    bos: options.CalibrationBos = None,
    mix: options.Mix = None,
    seed: options.Seed = None,
    device: options.RecipeDevice = None,
    dtype: options.RecipeDtype = None,
    json_: PrintJson = False,
) -> None:
    """Explain OUT: what was removed, where, why, and at what error. Or measure a dense model with --sensitivity."""
    files = tuple(calibration) if calibration else None
    text = options.given(files=files, field=field, samples=samples, seq_len=seq_len, bos=bos, mix=mix or None)
    flags = options.given(seed=seed, device=device, dtype=dtype)
    if sensitivity:
        if why is not None:
            raise InputError("--why explains a result, --sensitivity measures a dense model: give one of them")
        _measure(str(out), text, flags, json_)
        return
    if text or flags:
        raise InputError("text, seed, device and dtype belong to --sensitivity: add it, or leave them out")
    from niwaki.compression.inspect import inspect as run
    from niwaki.compression.run_record import read_run

    read_run(out)  # refuses any other folder before torch is loaded
    from niwaki.compression.why import why as explain

    result = run(out) if why is None else explain(out, why)
    if json_:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
    elif why is None:
        print_inspection(console, result)
    else:
        print_why(console, result)


def _measure(model: str, text: dict[str, Any], flags: dict[str, Any], json_: bool) -> None:
    """Measure a dense model on a text, and print what its blocks and matrices lose."""
    from niwaki.cli.progress import Display
    from niwaki.cli.sensitivity import print_sensitivity

    options.check_inputs(model, data=text.get("files"), device=flags.get("device"))
    from niwaki.compression.sensitivity import measure_sensitivity

    with Display(options.error_console) as display:
        result = measure_sensitivity(model, calibration=text, report=display, **flags)
    if json_:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        print_sensitivity(console, result)


def print_inspection(to: Console, result: dict[str, Any]) -> None:
    """Print the result of `niwaki.inspect`."""
    made = result["made"]
    where = f" in blocks {made['blocks']}" if "blocks" in made else ""
    print_line(f"{result['out']}: {result['kind']}, {made['method']} {made['target']}{where}, {made['date']}", to)
    for line in result["methods"]:
        print_line(f"  {line}", to)
    print_table(to, ["measured", "value"], _facts(result))
    for run in result["earlier"]:
        where = f"blocks {run['blocks']}" if "blocks" in run else "all blocks"
        print_line(f"earlier run: {run['method']} {run['target']} in {where}, {run['date']}", to)
    for stage in result["stages"]:
        print_line(f"before that: {stage['method']} {stage['target']}, {_shape_text(stage['allocation'])}", to)
    if text := _shape_text(result["allocation"]):
        print_line(f"shape: {text}", to)
    print_line(f"allocation: {result['allocation']['rule']}", to)
    title = TITLES[result["measure"]]
    if result["matrices"]:
        print_line(f"\n{title} by depth, first block to last", to)
        rows = {name: (row["values"], row["value"]) for name, row in result["matrices"].items()}
        print_heatmap(to, rows, lambda value: _number(value, title))
    if result["blocks"]:
        _print_depth(to, result["blocks"])
        _print_cut(to, result, title)
    if "predictor" in result:
        _print_predictor(to, result)
    for name, weight in result["kept_dense"].get("weights", {}).items():
        where = f"{weight['bytes']:,} bytes in {weight['blocks']} blocks"
        print_line(f"dense: {name}, {weight['reason']}, {where}", to)
    for text in result["notes"]:
        print_line(f"note: {text}", to)


def print_why(to: Console, result: dict[str, Any]) -> None:
    """Print the explanation of one matrix."""
    rows, columns = result["shape"]
    print_line(f"{result['matrix']}, {rows} × {columns}, target {result['target']}", to)
    total = max(rows * columns, 1)
    removed = [["weights removed with heads or neurons", f"{result['removed']:,}"]] if result["removed"] else []
    facts = [
        *removed,
        ["weights kept", f"{result['kept']:,} ({result['kept'] / total:.4%})"],
        ["weights zero", f"{result['cut']:,} ({result['cut'] / total:.4%})"],
        ["stored", f"{result['bytes']:,} bytes, {result['bits']:.3f} bits a weight"],
        ["calibration tokens", f"{result['tokens']:,}"],
    ]
    facts += [[_ERRORS[name], f"{value:.6g}"] for name, value in result["errors"].items()]
    if result["error_elsewhere"] is not None:
        facts.append(["the same matrix in other blocks, mean error", f"{result['error_elsewhere']:.6g}"])
    for name, value in result["detail"].items():
        facts.append([name.replace("_", " "), _detail(name, value)])
    print_table(to, ["", "value"], facts)
    print_line(f"chosen by: {result['chosen_by']}", to)
    for reason in result["reasons"]:
        print_line(f"reason: {reason}", to)
    if result["scores"]:
        _print_scores(to, result["scores"])


_ERRORS = {
    "error_before_update": "error before the other weights were updated",
    "error": "error as stored",
    "block_error": "error of the whole block's output",
    "drift": "drift of the hidden states after the block",
    "heldout_error_start": "held-out block error before learning",
    "heldout_error": "held-out block error after learning",
}


def _facts(result: dict[str, Any]) -> list[list[str]]:
    made, measured = result["made"], result["measured"]
    share = measured["bytes"] / measured["dense_bytes"]
    rows = [
        ["bytes of the weight files", f"{measured['bytes']:,} of {measured['dense_bytes']:,} ({share:.2%})"],
        ["matrices", f"{measured['matrices']:,}, {measured['weights']:,} weights"],
        ["bits a weight in them as stored, with scales", f"{measured['bits']:.3f}, {measured['packed']} packed"],
    ]
    if result["measure"] != "bits" or result["kind"] == "pruned and quantized":
        rows.insert(2, ["zeros in them", f"{measured['zeros_frac']:.4%}"])
    if named := result["named"]:
        text = f"{named['bits']:.3f} bits a weight, {named['zeros_frac']:.4%} zeros"
        rows.append([f"{named['matrices']:,} matrices of blocks {made['blocks']}", text])
    if "method_bits" in measured:
        rows.append(["bits a weight as the method counts", f"{measured['method_bits']:.3f}"])
    if "embeddings_bits" in measured:
        rows.append(["bits a weight in embeddings and head", f"{measured['embeddings_bits']:.3f}"])
    windows = made["calibration"]
    calibration = "none" if windows is None else f"{windows['windows']} windows of {windows['tokens']} tokens"
    rows += [["calibration", calibration], ["seconds", f"{measured['seconds']:,} on {made['device']}"]]
    rows.append(["peak memory", f"{measured['peak_rss_bytes'] / 1e9:.2f} GB"])
    if measured["peak_device_bytes"]:
        rows.append(["peak memory of the device", f"{measured['peak_device_bytes'] / 1e9:.2f} GB"])
    return rows


def _shape_text(allocation: dict[str, Any]) -> str:
    if "shape" not in allocation:
        return ""
    shape = allocation["shape"]
    counts = [f"{_span(shape[kind])} {what}" for kind, what in (("neurons", "neurons"), ("heads", "groups of heads"))]
    removed = f", blocks {', '.join(map(str, shape['dropped']))} removed" if shape.get("dropped") else ""
    where = "" if allocation.get("cut", True) else ", stored as zeros"
    tried = f"; {len(allocation['trials'])} shapes tried" if allocation.get("trials") else ""
    return (
        f"{' and '.join(counts)} a block{removed}{where}, {allocation['removed_frac']:.2%} of the blocks removed{tried}"
    )


def _span(value: int | list[int]) -> str:
    return f"{min(value)} to {max(value)}" if isinstance(value, list) else str(value)


def _number(value: float, title: str) -> str:
    return f"{value:.3f}" if title == TITLES["bits"] else f"{value:.2%}"


def _print_depth(to: Console, blocks: list[dict[str, Any]]) -> None:
    """Print the error of each block on its own inputs, and the drift of the hidden states after it."""
    for name, title in (("error", "error of each block's output"), ("drift", "drift after each block")):
        values = [block[name] for block in blocks]
        if known := [value for value in values if value is not None]:
            line = Text(f"\n{title}, {known[0]:.3g} in the first to {known[-1]:.3g} in the last\n  ")
            room = max(8, to.width - 4) if to.is_terminal else len(values)
            line.append(cells(fewer(values, room), 0.0, max(known), to.is_terminal))
            line.append(f"  max {max(known):.3g}")
            to.print(line, soft_wrap=True, highlight=False)


def _print_cut(to: Console, result: dict[str, Any], title: str) -> None:
    """Print shares and errors by kind of matrix and by block, then the worst. Errors need calibration text."""
    measure = result["measure"]
    measured = any(block["error"] is not None or block["worst"] is not None for block in result["blocks"])
    headers = ["matrix", title, "bytes", *(["mean error", "max error"] if measured else [])]
    rows = [
        [name, _number(row["value"], title), f"{row['bytes']:,}", _error(row["error"]), _error(row["max_error"])]
        for name, row in result["matrices"].items()
    ]
    print_table(to, headers, [row[: len(headers)] for row in rows])
    rows = [
        [
            f"{block['block']}{' removed' if block['gone'] else _by_run(result['runs'][str(block['block'])])}",
            _number(block[measure], title),
            f"{block['bytes']:,}",
            _error(block["error"]),
            "" if block["worst"] is None else f"{block['worst']} {block['worst_error']:.3g}",
        ]
        for block in result["blocks"]
    ]
    headers = ["block", title, "bytes", *(["block error", "worst matrix"] if measured else [])]
    print_table(to, headers, [row[: len(headers)] for row in rows])
    print_line(ERROR if measured else "no errors: the method saw no text (use --calibration to get them)", to)
    for line in result["worst"]:
        before = line["error_before_update"] if measure != "bits" else None
        was = "" if before in (None, line["error"]) else f", {before:.4g} before the other weights were updated"
        print_line(f"largest error: block {line['block']} {line['matrix']}, {line['error']:.4g}{was}", to)


def _by_run(number: int | None) -> str:
    """Return a mark of a block that this run did not compress."""
    return " as it was" if number is None else " earlier run" if number else ""


def _print_predictor(to: Console, result: dict[str, Any]) -> None:
    """Print the predictor, which decides at run time what to skip."""
    about = result["predictor"]
    if about.get("unit") == "inputs":
        _print_thresholds(to, about)
        return
    rows = [
        ["parameters", f"{about['parameters']:,}, {about['share_of_decoder']:.2%} of the decoder's"],
        ["reads", ", ".join(about["features"]) or "nothing: a static mask"],
        ["rank, samples", f"{about.get('rank', 0)}, {about['samples']:,}"],
        ["skipped on average", f"{about['skipped_frac']:.2%} of the units that can be skipped"],
        ["rule", ", ".join(f"{name} {value}" for name, value in about["rule"].items())],
        ["runs", ", ".join(f"{name} {value}" for name, value in about["running"].items())],
    ]
    held = about.get("held_out_kept")
    if held:
        rows.append(["importance kept, held out", f"{max(held.values()):.4f} by the best half"])
    print_table(to, ["predictor", "value"], rows)
    for kind, row in result["matrices"].items():
        line = Text(f"  importance of the {kind} that run: ")
        line.append(cells(row["importance"], 0.0, 1.0, to.is_terminal))
        to.print(line, soft_wrap=True, highlight=False)


def _print_thresholds(to: Console, about: dict[str, Any]) -> None:
    """Print the thresholds of inputs, and what their trial found."""
    rows = [
        ["thresholds", f"{about['places']:,}, one for the matrices of a block that read the same input"],
        ["shares", "by measured damage" if about["scope"] == "global" else "the same everywhere"],
        ["skipped on average", f"{about['skipped_frac']:.2%} of the weights"],
        ["perplexity over dense", f"{about['ratio']:.4g} on {about['windows']} held-out windows"],
        ["divergence", f"{about['divergence']:.4g} nats per token"],
        ["runs", ", ".join(f"{name} {about['running'][name]}" for name in RUNNING_OF_INPUTS)],
    ]
    print_table(to, ["inputs", "value"], rows)


def _print_scores(to: Console, scores: dict[str, Any]) -> None:
    """Print histograms over log₁₀ of the score, of kept and of cut weights, and the threshold."""
    print_line(f"\nscores of {scores['sampled']:,} weights sampled over the matrix, on a logarithmic scale", to)
    if "log10" in scores:
        peak = max(*scores["kept"], *scores["cut"], 1)
        low, high = (10**power for power in scores["log10"])
        for name in ("kept", "cut"):
            line = Text(f"  {name:<5}")
            line.append("".join(" " if not n else BARS[min(n * len(BARS) // peak, 7)] for n in scores[name]))
            line.append(f"  {sum(scores[name]):,}")
            to.print(line, soft_wrap=True, highlight=False)
        print_line(f"       {low:.3g} … {high:.3g}", to)
    if scores["zero"]:
        print_line(f"  {scores['zero']:,} scores are zero", to)
    from niwaki.methods.mask_scores import QUANTILES

    quantiles = zip(QUANTILES, scores["quantiles"], strict=True)
    print_line("  quantiles: " + ", ".join(f"{q:.0%} {value:.3g}" for q, value in quantiles), to)
    if "lost" in scores:
        low, middle, high = scores["lost"]
        where = (
            "one threshold" if scores["thresholds"] == 1 else f"{scores['thresholds']:,} thresholds (rows or panels)"
        )
        print_line(f"  highest score that was cut: {low:.4g} to {high:.4g}, median {middle:.4g}; {where}", to)
    else:
        print_line("  no threshold: weights were compared within groups of neighbours", to)


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _detail(name: str, value: Any) -> str:
    if name == "parts":
        return "; ".join(
            f"{p['columns']} columns at {p['bits']} bits, {p['grid']}, groups of {p['group']}" for p in value
        )
    if name == "trellis":
        return "; ".join(f"{p['columns']} columns at {p['bits']} bits, trellis" for p in value)
    if name == "sparse":
        return f"{value['layout']} of {value['values']}, {value['bytes']:,} bytes of values"
    if isinstance(value, list):
        return f"{min(value)} to {max(value)}" if name == "row_zeros" and value else f"{len(value)}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
