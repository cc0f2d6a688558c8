"""The command `niwaki demo`: compress the embedded sapling to 2:4 and compare it with the dense model, offline.

The model is part of the package. The texts are the help topics of Python (`pydoc_data.topics`): each second one is for
calibration, the others are for evaluation.
"""

import json
import time
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import typer

from niwaki.cli.options import console, error_console, print_line
from niwaki.cli.tables import print_table
from niwaki.config.events import Report
from niwaki.errors import OutputError

PRESET = "fast"  # the best that two cores do in well under two minutes
TARGET = "2:4"
SEQ_LEN = 512
SAMPLES = 32
EVALUATION_TOKENS = 40 * SEQ_LEN


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = Path("niwaki-demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo.")] = False,
) -> None:
    """Compress the built-in model to 2:4 and compare it with the dense one, offline."""
    from niwaki.cli.progress import Display

    with Display(error_console) as display:
        numbers = run_demo(out, overwrite=overwrite, report=display)
    _print_demo(numbers, out)


def sapling() -> Path:
    """Return the folder of the embedded model."""
    return Path(str(files("niwaki") / "data" / "sapling"))


def demo_texts() -> tuple[list[str], list[str]]:
    """Return (calibration, evaluation): two disjoint lists of help texts in alphabetical order."""
    ordered = sorted(set(topics.values()))  # some topics share one text under several names
    return ordered[0::2], ordered[1::2]


def run_demo(out: Path, *, overwrite: bool = False, report: Report | None = None) -> dict[str, Any]:
    """Compress the sapling into `out`, evaluate both models, and return the numbers of the table."""
    from niwaki.compression.compress import compress
    from niwaki.compression.places import check_apart
    from niwaki.measure.evaluate.evaluation import evaluate
    from niwaki.model.files import write_text

    check_apart(sapling(), out)
    paths = [out.parent / f"{out.name}-{part}.jsonl" for part in ("calibration", "evaluation")]
    contents = ["".join(json.dumps({"text": text}) + "\n" for text in texts) for texts in demo_texts()]
    _check_free(out, dict(zip(paths, contents, strict=True)), overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create {out.parent}: {error.strerror}. Choose another folder with --out") from error
    for path, content in zip(paths, contents, strict=True):
        write_text(path, content)
    calibration = {"files": (str(paths[0]),), "samples": SAMPLES, "seq_len": SEQ_LEN}
    record = compress(
        sapling(), out, preset=PRESET, target=TARGET, calibration=calibration, overwrite=overwrite, report=report
    )
    started = time.perf_counter()
    data = str(paths[1])
    scores = evaluate(
        out, reference=sapling(), data=[data], seq_len=SEQ_LEN, max_tokens=EVALUATION_TOKENS, report=report
    )
    return {
        "preset": PRESET,
        "target": TARGET,
        "zeros_frac": record["result"]["zeros_frac"],
        "tokens": scores["tokens"][data],
        "bytes": (scores["reference_bytes"], scores["bytes"]),
        "perplexity": (scores["reference_perplexity"][data], scores["perplexity"][data]),
        "kl": scores["kl"][data],
        "top1_agreement": scores["top1_agreement"][data],
        "seconds_compress": record["seconds"],
        "seconds_evaluate": round(time.perf_counter() - started, 2),
    }


def _check_free(out: Path, contents: dict[Path, str], overwrite: bool) -> None:
    """Raise OutputError if a file or folder of this demo exists, unless `overwrite` is set."""
    from niwaki.compression.places import check_free, partial_of

    if out.parent.is_dir():
        check_free(out, resume=False, overwrite=True)  # refuses a folder that niwaki did not write
    taken = [folder for folder in (out, partial_of(out)) if folder.is_dir() and any(folder.iterdir())]
    taken += [path for path, content in contents.items() if _differs(path, content)]
    if taken and not overwrite:
        raise OutputError(
            f"{taken[0]} already exists: choose another folder with --out, or replace it with --overwrite"
        )


def _differs(path: Path, content: str) -> bool:
    return path.exists() and not (path.is_file() and path.read_bytes() == content.encode())


def _print_demo(numbers: dict[str, Any], out: Path) -> None:
    """Print the numbers of `run_demo` as a table."""
    dense_ppl, pruned_ppl = numbers["perplexity"]
    rows = [
        ["bytes on disk", f"{numbers['bytes'][0]:,}", f"{numbers['bytes'][1]:,}"],
        ["zeros in decoder matrices", "0 %", f"{numbers['zeros_frac']:.2%}"],
        ["perplexity", f"{dense_ppl:.2f}", f"{pruned_ppl:.2f}"],
        ["KL to dense (nats/token)", "0", f"{numbers['kl']:.4f}"],
        ["top-1 agreement", "100 %", f"{numbers['top1_agreement']:.1%}"],
        ["seconds", "", f"{numbers['seconds_compress']} compress, {numbers['seconds_evaluate']} evaluate"],
    ]
    compressed = f"preset {numbers['preset']}, {numbers['target']}"
    print_table(console, ["", "dense", compressed], rows, "sapling, 7.3M parameters")
    print_line(f"{numbers['tokens']:,} evaluation tokens. Zeros are stored in place, so the bytes stay. Result: {out}")
