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

from niwaki.compression import compress
from niwaki.evaluation import evaluate
from niwaki.methods import BEST
from niwaki.walk import Report

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
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out.parent / f"{out.name}-{part}.jsonl" for part in ("calibration", "evaluation")]
    for path, texts in zip(paths, demo_texts(), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    record = compress(
        sapling(),
        out,
        method=BEST,
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
        "method": BEST,
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
