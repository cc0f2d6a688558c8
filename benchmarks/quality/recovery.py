"""Quality against tokens of a recovery: perplexity of results before and after `niwaki recover`, for several budgets.

    python -m benchmarks.quality.recovery MODEL DATA --case 2:4 --tokens 100k 300k 1M 3M 10M --jobs 6 --gpus 2 \
        --mix self:0.5 --keep FOLDER --out benchmarks/results/quality/recovery-NAME.json [--device cuda]

DATA as for quality.py. A case is compressed once (or found in FOLDER, where it stays). Every budget is a training of
its own that begins with it: its rate warms up and falls to zero over its own steps. So no budget is a checkpoint of a
larger one, which would be scored at a high rate. The text is calibration.jsonl and the mix; text of the model itself is
written once, before all trainings. The evaluation texts are in neither.

`--jobs` runs at a time share the GPUs evenly, the longest first. Finished points of an earlier OUT are kept, and no
point begins after `--stop` seconds.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import niwaki
from benchmarks.common.perplexity import perplexities
from benchmarks.common.provenance import provenance
from niwaki.compression.recovery.training import HELD_OUT
from niwaki.config.targets import parse_count
from niwaki.data.texts import sampled_windows

CASES: dict[str, dict] = {
    "2:4": {"preset": "best", "target": "2:4"},
    "balanced 2:4": {"preset": "balanced", "target": "2:4"},
    "50%": {"preset": "best", "target": "0.5"},
    "sparsegpt 2:4": {"method": "sparsegpt", "target": "2:4"},
    "comp 20%": {"method": "comp", "target": "0.2"},
    "2.28 bits": {"method": "squeeze10", "target": "2.28bit", "pack": "codes"},
    "1.75 bits": {"method": "squeeze10", "target": "1.75bit", "pack": "codes"},
    "trellis 2.28 bits": {"method": "trellis", "target": "2.28bit", "pack": "codes"},
    "gptq 2 bits": {"method": "gptq", "target": "2bit", "options": {"group": 64}, "pack": "codes"},
    "gptq 4 bits": {"method": "gptq", "target": "4bit", "options": {"group": 64}, "pack": "codes"},
}
SEQ_LEN = 512
MEMORY_SHARE = 0.95  # of a GPU, of all jobs together
WRITER_SHARE = 0.45  # of a GPU, while the model writes text and the cases are compressed


@dataclass(frozen=True)
class Setting:
    """Settings that all runs have in common."""

    model: str
    data: Path
    folder: Path
    device: str
    samples: int
    seed: int
    mix: tuple[str, ...]

    @property
    def text_seed(self) -> int:
        """Return the seed of the text, which is not that of the compressions."""
        return self.seed + 100


@dataclass(frozen=True)
class Point:
    """One training."""

    case: str
    tokens: int
    rate: float | None
    train: str


def compressed(setting: Setting, case: str) -> Path:
    """Return the result of a case, made if it is not there."""
    out = setting.folder / case.replace(" ", "-").replace("%", "").replace(":", "-")
    if not out.is_dir():
        text = str(setting.data / "calibration.jsonl")
        niwaki.compress(
            setting.model, out, calibration={"files": (text,), "samples": setting.samples, "seq_len": SEQ_LEN},
            seed=setting.seed, device=setting.device, dtype="float32", **CASES[case],
        )  # fmt: skip
    return out


def started(setting: Setting, case: str) -> dict[str, Any]:
    """Compress a case, and return its perplexities."""
    return perplexities(str(compressed(setting, case)), setting.data, setting.device)["perplexity"]


def written(setting: Setting, tokens: int) -> float:
    """Write the text of the model for the largest budget into the cache, and return the seconds."""
    began = time.perf_counter()
    share = sum(float(part.partition(":")[2]) for part in setting.mix if part.startswith("self:"))
    if share:
        samples = int(share * (tokens // SEQ_LEN + HELD_OUT)) + 1
        before = _limit_memory(WRITER_SHARE)
        sampled_windows(setting.model, samples=samples, seq_len=SEQ_LEN, seed=setting.text_seed, device=setting.device)
        _limit_memory(before)
    return round(time.perf_counter() - began, 1)


def recovered(setting: Setting, point: Point, until: float) -> dict[str, Any] | None:
    """Recover with a budget, and return losses, perplexities and costs; None after the time `until`."""
    if time.time() > until:
        return None
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        record = niwaki.recover(
            compressed(setting, point.case), Path(folder) / "out", data=str(setting.data / "calibration.jsonl"),
            mix=setting.mix, tokens=point.tokens, rate=point.rate, train=point.train, seed=setting.text_seed,
            device=setting.device,
        )  # fmt: skip
        result, told = record["result"], record["recover"]
        row: dict[str, Any] = {"seconds": round(time.perf_counter() - began, 1), "learned": told["train"]}
        row |= {name: result.get(name) for name in ("heldout_loss_before", "heldout_loss", "steps", "packed_bits")}
        row |= {"batch": told["batch"], "used_rate": told["rate"]}
        row |= {"planned_bytes": told["memory"]["total"], "peak_rss_bytes": record["peak_rss_bytes"]}
        row |= {"peak_device_bytes": record.get("peak_device_bytes"), "memory": told["memory"]}
        row["perplexity"] = perplexities(str(Path(folder) / "out"), setting.data, setting.device)["perplexity"]
    return row


def begin(counter: Any, gpus: int, share: float) -> None:
    """Give a process its GPU, before CUDA starts in it, and its share of the memory."""
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if gpus > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
    _limit_memory(share)


def _limit_memory(share: float) -> float:
    """Limit the memory of this process on its GPU, and return the limit before."""
    if not torch.cuda.is_available():
        return 1.0
    before = torch.cuda.get_per_process_memory_fraction()
    torch.cuda.set_per_process_memory_fraction(share)
    return before


def main() -> None:
    """Measure every case and budget, and write the result after each."""
    args = _arguments()
    began, folder = time.time(), args.keep or Path(tempfile.mkdtemp(prefix="niwaki-recovery-"))
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(args.model, args.data, folder, args.device, args.samples, args.seed, tuple(args.mix))
    tokens = [parse_count(one) for one in args.tokens]
    points = [
        Point(case, one, rate, train)
        for one in sorted(tokens, reverse=True)
        for case in args.case
        for rate in args.rate
        for train in args.train
    ]
    rows: list[dict[str, Any]] = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    done = [{name: row.get(name) for name in asdict(points[0])} for row in rows]
    points = [point for point in points if asdict(point) not in done]
    head = {"model": Path(args.model).name, **provenance(args.device), "mix": args.mix, "seed": args.seed}
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))
    context = multiprocessing.get_context("spawn")
    limits = (context.Value("i", 0), args.gpus, min(1.0, MEMORY_SHARE * args.gpus / args.jobs))
    with ProcessPoolExecutor(args.jobs, mp_context=context, initializer=begin, initargs=limits) as pool:
        text = pool.submit(written, setting, max(tokens))
        before = {case: pool.submit(started, setting, case) for case in args.case}
        dense = pool.submit(perplexities, args.model, args.data, args.device).result()["perplexity"]
        result = {**head, "dense": dense, "text_s": text.result(), "rows": rows}
        usable = {case for case, one in before.items() if _succeeded(case, one)}
        work: dict[Future[Any], Point] = {
            pool.submit(recovered, setting, point, began + args.stop): point for point in points if point.case in usable
        }
        for future in as_completed(work):
            point = work[future]
            if _succeeded(str(point), future) and (found := future.result()) is not None:
                rows.append({**asdict(point), "before": before[point.case].result(), **found})
                ratios = [round(found["perplexity"][one] / dense[one], 3) for one in dense]
                print(point.case, f"{point.tokens:,}", found["used_rate"], ratios, found["seconds"], flush=True)
            result["seconds"] = round(time.time() - began, 1)
            args.out.write_text(json.dumps(result, indent=1) + "\n")  # a stopped run loses little
    if args.keep is None:
        shutil.rmtree(folder)


def _succeeded(name: str, future: Future[Any]) -> bool:
    """Return whether a run ended without an error, and print the error."""
    if (error := future.exception()) is not None:
        print(f"{name}: {error}", *traceback.format_exception(error)[-2:], file=sys.stderr, flush=True)
    return error is None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["2:4", "comp 20%", "2.28 bits", "1.75 bits"])
    parser.add_argument("--tokens", nargs="+", default=["100k", "300k", "1M", "3M", "10M"])
    parser.add_argument("--rate", nargs="+", type=float, default=[None])
    parser.add_argument("--train", nargs="+", default=["auto"])
    parser.add_argument("--mix", nargs="*", default=["self:0.5"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--keep", type=Path, help="folder of the compressed models")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that the jobs are spread over")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--stop", type=float, default=float("inf"), help="begin no training after these seconds")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
