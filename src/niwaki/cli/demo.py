"""The embedded default: compress the sapling to 2:4 and compare it with the dense one, offline.

The model lies in the package; the texts are Python's own help topics (`pydoc_data.topics`), every second one
for calibration and the others for evaluation.
"""

import json
import time
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from niwaki.compression.compress import compress
from niwaki.compression.run import check_apart, check_free, partial_of
from niwaki.config.events import Report
from niwaki.errors import OutputError
from niwaki.measure.evaluate.evaluation import evaluate
from niwaki.model.files import write_text

PRESET = "fast"  # the best that two cores do in well under two minutes
TARGET = "2:4"
SEQ_LEN = 512
SAMPLES = 32
EVALUATION_TOKENS = 40 * SEQ_LEN


def sapling() -> Path:
    """Folder of the embedded model."""
    return Path(str(files("niwaki") / "data" / "sapling"))


def demo_texts() -> tuple[list[str], list[str]]:
    """(calibration, evaluation): disjoint help texts in alphabetical order."""
    ordered = sorted(set(topics.values()))  # some topics share one text under several names
    return ordered[0::2], ordered[1::2]


def run_demo(out: Path, *, overwrite: bool = False, report: Report | None = None) -> dict[str, Any]:
    """Compresses the sapling into `out` and evaluates both; returns the numbers of the table."""
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
    record = compress(
        sapling(),
        out,
        preset=PRESET,
        target=TARGET,
        calibration={"files": (str(paths[0]),), "samples": SAMPLES, "seq_len": SEQ_LEN},
        overwrite=overwrite,
        report=report,
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
    """Refuses to touch what an earlier demo, or anyone else, left in the places of this one."""
    check_free(out, partial_of(out), resume=False, overwrite=True)  # whose folders they are
    taken = [folder for folder in (out, partial_of(out)) if folder.is_dir() and any(folder.iterdir())]
    taken += [path for path, content in contents.items() if _differs(path, content)]
    if taken and not overwrite:
        raise OutputError(
            f"{taken[0]} already exists: choose another folder with --out, or replace it with --overwrite"
        )


def _differs(path: Path, content: str) -> bool:
    return path.exists() and not (path.is_file() and path.read_bytes() == content.encode())
