"""Speed of a whole model in every variant: BENCH's 1B shape on the CPU, the Llama-2-7B shape on a GPU, random weights.

    python -m benchmarks.speed.whole_model --shape 1b --threads 2 --out benchmarks/results/speed/whole-model-cpu.json
    python -m benchmarks.speed.whole_model --shape 7b --out benchmarks/results/speed/whole-model-h100.json

`niwaki.measure.bench.benchmark` measures as `niwaki bench` does, in bf16. The file is written after every variant, and
its other rows are kept. A long table can thus be made in pieces (`--variants`, `--batch none`, `--prompt 0`). `--plot`
draws the rows of the file.
"""

import argparse
import gc
import json
import tempfile
import traceback
from pathlib import Path

import torch
from rich.console import Console

import niwaki
from benchmarks.common.checkpoints import SHAPES
from benchmarks.common.decoders import dense_config
from niwaki.cli.bench import batch_numbers, print_bench
from niwaki.cli.progress import Display
from niwaki.measure.bench.plot import draw
from niwaki.measure.bench.schema import merge_benches, read_bench, write_bench
from niwaki.measure.bench.variants import VARIANTS


def config_of(shape: str, blocks: int | None) -> dict:
    """Return the config of a shape, with fewer blocks if `blocks` says so."""
    if shape == "1b":
        values = dense_config().to_dict()
    else:
        found = SHAPES[shape]
        values = dense_config().to_dict() | {
            "hidden_size": found.hidden, "intermediate_size": found.middle, "num_hidden_layers": found.blocks,
            "num_attention_heads": found.heads, "num_key_value_heads": found.key_value_heads,
            "head_dim": found.hidden // found.heads,
        }  # fmt: skip
    return values | ({"num_hidden_layers": blocks} if blocks else {})


def main() -> None:
    """Measure every variant, and print and plot the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["1b", "7b"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--batch", default="1,4,16")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--blocks", type=int, help="fewer blocks than the shape has, for a trial")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as place, Display(Console(stderr=True)) as display:
        folder = Path(place) / (f"{args.shape}-shape" + (f"-{args.blocks}-blocks" if args.blocks else ""))
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config_of(args.shape, args.blocks), default=str))
        for variant in args.variants:
            try:
                new = niwaki.bench(
                    folder, variants=[variant], batches=batch_numbers(args.batch), prompt_tokens=args.prompt,
                    new_tokens=args.new, context=args.context, rounds=args.rounds, seconds=args.seconds,
                    threads=args.threads, device=args.device, dtype="bfloat16", report=display,
                )  # fmt: skip
            except RuntimeError:  # a kernel that fails is not a reason to lose the others
                traceback.print_exc()
                failed.append(variant)
                continue
            finally:
                gc.collect()
                torch.cuda.empty_cache()
            whole = merge_benches(read_bench(args.out), new) if args.out.is_file() else new
            write_bench(args.out, whole)
    found = read_bench(args.out)
    print_bench(Console(width=200), found)
    if torch.cuda.is_available():
        print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    if args.plot:
        draw(found, args.plot)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
