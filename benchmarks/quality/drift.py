"""Drift of the hidden states of a compressed model from the dense ones, block after block.

    python -m benchmarks.quality.drift MODEL DATA --out benchmarks/results/quality/drift-NAME.json

For each supervision of squeeze10 (FIAS) and without, the same bits everywhere: ‖x − y‖² / ‖y‖² after every block. The
windows are those of the calibration, and those of the evaluation text, which no method has read. DATA as for
quality.py.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import niwaki
from benchmarks.common.provenance import provenance
from niwaki.data.documents import read_texts
from niwaki.data.stream import Stream
from niwaki.data.texts import calibration_windows, evaluation_windows, load_tokenizer
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder

SWEPT = {"widths": "1+4", "rounds": 0}
CASES = {
    "1+4, one sweep, prefix": SWEPT, "1+4, one sweep, full inputs": SWEPT | {"supervise": "inputs"},
    "1+4, one sweep, full outputs": SWEPT | {"supervise": "outputs"},
    "default, prefix": {}, "default, full inputs": {"supervise": "inputs"},
    "default, full outputs": {"supervise": "outputs"},
    "default, half outputs": {"supervise": "outputs", "supervise_frac": 0.5},
}  # fmt: skip


def drift(dense: Path, compressed: Path, ids_ST: Tensor, device: torch.device) -> list[float]:
    """Return the relative squared distance after every block, from sums over all windows."""
    decoders = [Decoder(Checkpoint.open(str(folder)), device, torch.float32) for folder in (dense, compressed)]
    streams = [Stream(decoder, ids_ST) for decoder in decoders]
    found = []
    for index in range(len(decoders[0])):
        for decoder, stream in zip(decoders, streams, strict=True):
            block = decoder.load(index)
            stream.advance(block)
            block.release()
        y_STD, x_STD = (stream.hidden.store_STD.double() for stream in streams)
        found.append(float((x_STD - y_STD).square().sum() / y_STD.square().sum()))
    return found


def main() -> None:
    """Measure every case and seed, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--target", default="1.75bit")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    device, text = torch.device(args.device), str(args.data / "calibration.jsonl")
    tokenizer = load_tokenizer(args.model)
    unseen_ST = evaluation_windows(
        read_texts([str(args.data / "eval_reviews.jsonl")], "text"), tokenizer, seq_len=512, max_tokens=16_384
    )
    rows: list[dict] = []
    result = {
        "what": "relative squared distance of the hidden states from the dense model's after every block",
        "model": args.model.name,
        "target": args.target,
        **provenance(args.device),
        "rows": rows,
    }
    for label, options in CASES.items():
        for seed in range(args.seeds):
            seen_ST = calibration_windows(read_texts([text], "text"), tokenizer, samples=64, seq_len=512, seed=seed)
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                niwaki.compress(
                    str(args.model),
                    out,
                    method="squeeze10",
                    target=args.target,
                    seed=seed,
                    options=options | {"learn_rounds": 0},
                    allocation="uniform",
                    device=args.device,
                    dtype="float32",
                    calibration={"files": (text,), "samples": 64, "seq_len": 512},
                )
                rows.append(
                    {
                        "label": label,
                        "options": options,
                        "seed": seed,
                        "calibration": drift(args.model, out, seen_ST[:32], device),
                        "unseen": drift(args.model, out, unseen_ST, device),
                    }
                )
            print(label, seed, *(round(rows[-1][on][-1], 4) for on in ("calibration", "unseen")), flush=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
