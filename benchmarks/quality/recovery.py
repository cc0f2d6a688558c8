"""Quality against tokens of a recovery: perplexity of results before and after `niwaki recover`, for several budgets.

    python -m benchmarks.quality.recovery MODEL DATA --case 2:4 --tokens 100k 300k 1M 3M 10M --rate 0.002 \
        --mix self:0.5 --keep FOLDER --out benchmarks/results/quality/recovery-NAME.json [--device cuda]

DATA as for quality.py. A case is compressed once (or found in FOLDER, where it stays). Every budget begins with it. The
text is calibration.jsonl and the mix. The evaluation texts are in neither. Several cases may run at the same time.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import niwaki
from benchmarks.common.perplexity import perplexities
from benchmarks.common.provenance import provenance
from niwaki.config.targets import parse_count
from niwaki.errors import NiwakiError

CASES: dict[str, dict] = {
    "2:4": {"preset": "best", "target": "2:4"},
    "50%": {"preset": "best", "target": "0.5"},
    "sparsegpt 2:4": {"method": "sparsegpt", "target": "2:4"},
    "comp 20%": {"method": "comp", "target": "0.2"},
    "2.28 bits": {"method": "squeeze10", "target": "2.28bit", "pack": "codes"},
    "1.75 bits": {"method": "squeeze10", "target": "1.75bit", "pack": "codes"},
    "gptq 2 bits": {"method": "gptq", "target": "2bit", "options": {"group": 64}, "pack": "codes"},
    "gptq 4 bits": {"method": "gptq", "target": "4bit", "options": {"group": 64}, "pack": "codes"},
}


def compressed(args: argparse.Namespace, case: str, folder: Path) -> Path:
    """Return the result of a case, made if it is not there."""
    out = folder / case.replace(" ", "-").replace("%", "").replace(":", "-")
    if not out.is_dir():
        calibration = {"files": (str(args.data / "calibration.jsonl"),), "samples": args.samples, "seq_len": 512}
        niwaki.compress(
            args.model, out, calibration=calibration, seed=args.seed, device=args.device, dtype="float32", **CASES[case]
        )
    return out


def recovered(args: argparse.Namespace, start: Path, tokens: str, rate: float | None, train: str) -> dict:
    """Recover with a budget, and return losses, perplexities and costs."""
    row: dict = {"tokens": parse_count(tokens), "rate": rate, "train": train}
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        try:
            record = niwaki.recover(
                start, Path(folder) / "out", data=str(args.data / "calibration.jsonl"), mix=args.mix,
                tokens=parse_count(tokens), rate=rate, train=train, seed=args.seed + 100, device=args.device,
            )  # fmt: skip
        except NiwakiError as error:
            return {**row, "error": str(error)}
        row |= {"seconds": round(time.perf_counter() - began, 1)}
        result, told = record["result"], record["recover"]
        row |= {name: result.get(name) for name in ("heldout_loss_before", "heldout_loss", "steps", "packed_bits")}
        row |= {"batch": told["batch"], "rate": told["rate"], "train": told["train"], "mix": told.get("mix")}
        row |= {"planned_bytes": told["memory"]["total"], "peak_rss_bytes": record["peak_rss_bytes"]}
        row |= {"peak_device_bytes": record.get("peak_device_bytes"), "memory": told["memory"]}
        row["perplexity"] = perplexities(Path(folder) / "out", args.data, args.device)["perplexity"]
    return row


def main() -> None:
    """Measure every case and budget, and write the result after each."""
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
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="niwaki-recovery-"))
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    dense = perplexities(args.model, args.data, args.device)["perplexity"]
    head = {"model": Path(args.model).name, **provenance(args.device), "mix": args.mix, "seed": args.seed}
    result = {**head, "dense": dense, "rows": rows}
    for case in args.case:
        start = compressed(args, case, folder)
        before = perplexities(start, args.data, args.device)["perplexity"]
        for tokens in args.tokens:
            for rate in args.rate:
                for train in args.train:
                    row = {"case": case, "before": before, **recovered(args, start, tokens, rate, train)}
                    rows.append(row)
                    ratios = [round(row["perplexity"][one] / dense[one], 3) for one in dense if "perplexity" in row]
                    print(case, tokens, row["rate"], row["train"], ratios, row.get("seconds"), row.get("error"))
                    sys.stdout.flush()
                    args.out.write_text(json.dumps(result, indent=1) + "\n")  # a stopped run loses little
    if args.keep is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
