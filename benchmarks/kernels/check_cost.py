"""Cost of the checks of packed matrices at load: this tree against another one, and against itself without checks.

    python -m benchmarks.kernels.check_cost --before OTHER_TREE --models RTN_4BIT MAGNITUDE_24 \
        --out benchmarks/results/kernels/check-cost-cpu.json

OTHER_TREE is a checkout from before the checks (`git worktree add --detach OTHER_TREE ebc7da7`) with its kernels.
One process per side stays alive, and the sides take turns in every round, each first in half of them. A matrix is
2048 × 2048: its module is made, its tensors are copied into it from memory, and its kernels are prepared. A model is
loaded by `niwaki.load` from files in the page cache. The floor is the time in which a processor reads the bytes that a
check must look at, once, from memory.
"""

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import cpu_timing
from benchmarks.common.provenance import provenance
from niwaki.formats.packed import PackedTensors
from niwaki.formats.quantized import QuantizedColumns
from niwaki.formats.sparse import Sparse
from niwaki.formats.sparse_tiles import Tiled

SIDE = 2048
SIDES = ("before", "after", "after_unchecked")


def records() -> dict[str, PackedTensors]:
    """Return one random record of every kind."""
    generator = torch.Generator().manual_seed(0)
    code_OI = torch.randint(0, 16, (SIDE, SIDE), generator=generator, dtype=torch.uint8)
    scale_OG = (torch.rand(SIDE, SIDE // 128, generator=generator) * 0.01 + 0.01).half()
    whole = QuantizedColumns(torch.arange(SIDE), 4, "symmetric", 128, code_OI, scale_OG)
    order_I = torch.randperm(SIDE, generator=generator)
    parts = []
    for columns_C, bits in ((order_I[: SIDE // 4].sort().values, 4), (order_I[SIDE // 4 :].sort().values, 1)):
        own = code_OI[:, columns_C] >> (4 - bits)
        parts.append(QuantizedColumns(columns_C, bits, "midrise", len(columns_C), own, scale_OG[:, :1]))
    weight_OI = torch.randn(SIDE, SIDE, generator=generator).bfloat16()
    score_OGM = torch.rand(SIDE, SIDE // 4, 4, generator=generator)
    keep_OI = (score_OGM >= score_OGM.topk(2, dim=2).values[..., 1:]).view(SIDE, SIDE)
    half_OI = torch.where(score_OGM.view(SIDE, SIDE) < 0.5, weight_OI, weight_OI.new_zeros(()))
    pairs = Sparse.encode_codes(whole, keep_OI, layout="two_four")
    tiles = None if pairs is None else Tiled.encode(pairs)
    assert tiles is not None
    return {
        "codes 4 bit": PackedTensors.of_codes([whole], (SIDE, SIDE)),
        "codes 4 and 1 bit": PackedTensors.of_codes(parts, (SIDE, SIDE)),
        "bitmap bf16": PackedTensors.of_nonzeros(Sparse.encode(half_OI, layout="bitmap")),
        "two_four bf16": PackedTensors.of_nonzeros(
            Sparse.encode(torch.where(keep_OI, weight_OI, weight_OI.new_zeros(())), layout="two_four")
        ),
        "tiles int4": PackedTensors.of_nonzeros(tiles),
    }


def checked_bytes(record: PackedTensors) -> int:
    """Return the bytes that a check must read: all but codes, whose every value is allowed."""
    free = ("planes", "zero") if "parts" in record.description else ()
    if record.description.get("sparse", {}).get("values") in ("int4", "int8"):
        free = ("values",)
    return sum(tensor.nbytes for name, tensor in record.tensors.items() if not name.startswith(tuple(free) or "-"))


def serve(folder: Path, unchecked: bool) -> None:
    """Answer every line of the input, a name of a matrix or the folder of a model, with the seconds of its load."""
    import niwaki
    from niwaki.runtime.linear import PackedLinear
    from niwaki.runtime.sparse_linear import SparseLinear

    torch.set_num_threads(1)
    if unchecked:
        from niwaki.formats.descriptors import Descriptor

        Descriptor.check = lambda *_: None  # type: ignore[method-assign, assignment]
    stored = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    described = json.loads((folder / "described.json").read_text())

    def matrix(name: str) -> None:
        kind: Any = SparseLinear if "sparse" in described[name] else PackedLinear
        layer = kind(SIDE, SIDE, described[name], False)
        layer.load_state_dict(stored[name])
        layer._prepare()

    print("ready", flush=True)
    for line in sys.stdin:
        name = line.strip()
        gc.collect()  # the model before, which would count
        begin = time.perf_counter()
        if name in described:
            matrix(name)
        else:
            niwaki.load(name, device="cpu")
        print(time.perf_counter() - begin, flush=True)


class Side:
    """Process that loads what it is told with the sources of one tree."""

    def __init__(self, name: str, tree: Path, folder: Path) -> None:
        here = Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(here)])}
        command = [sys.executable, str(Path(__file__)), "--serve", str(folder)]
        self.process = subprocess.Popen(
            [*command, "--unchecked"] if name == "after_unchecked" else command,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def seconds(self, what: str) -> float:
        """Return the seconds of one load."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return float(self._line())


def interleaved(sides: dict[str, Side], what: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return quartiles and minimum in milliseconds of every side, which take turns in a random order."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    chosen = random.Random(what)
    for number in range(rounds + 1):
        for name in chosen.sample(list(sides), len(sides)):
            seconds = sides[name].seconds(what)
            if number:  # the first round fills caches
                times[name].append(seconds * 1e3)
    found = {}
    for name, own in times.items():
        lower, middle, upper = statistics.quantiles(own, n=4)
        found[name] = {
            "median_ms": round(middle, 3), "quartiles_ms": [round(lower, 3), round(upper, 3)],
            "fastest_ms": round(min(own), 3),
        }  # fmt: skip
    return found


def scans_of(record: PackedTensors, rounds: int) -> float:
    """Return the median milliseconds of a check of tensors that lie in the cache."""
    from niwaki.formats.descriptors import read_descriptor
    from niwaki.kernels.scans import scans_for

    descriptor, scans = read_descriptor("m", record.description), scans_for(record.tensors)
    work: dict[str, Callable[[], object]] = {"check": lambda: descriptor.check(record.tensors, scans)}
    return round(cpu_timing.interleaved(work, rounds)["check"] * 1e3, 4)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", type=Path)
    parser.add_argument("--models", type=Path, nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--model-rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", type=Path)
    parser.add_argument("--unchecked", action="store_true")
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.unchecked)
        return
    here = Path(__file__).parents[2]
    torch.set_num_threads(1)
    bytes_per_s = cpu_timing.bandwidth()
    result: dict[str, Any] = {**provenance("cpu"), "bandwidth_gb_s": round(bytes_per_s / 1e9, 1)}
    with tempfile.TemporaryDirectory() as name:
        folder, made = Path(name), records()
        for kind, record in made.items():
            save_file(dict(record.tensors), folder / f"{kind}.safetensors")
        (folder / "described.json").write_text(json.dumps({kind: r.description for kind, r in made.items()}))
        trees = {"before": args.before, "after": here, "after_unchecked": here}
        sides = {side: Side(side, trees[side], folder) for side in SIDES if trees[side]}
        result["matrix_2048x2048_one_thread"] = {
            kind: {
                "floor_ms": round(checked_bytes(record) / bytes_per_s * 1e3, 4),
                "check_ms": scans_of(record, args.rounds),
                "load": interleaved(sides, kind, args.rounds),
            }
            for kind, record in made.items()
        }
        result["model_one_thread"] = {
            path.name: interleaved(sides, str(path.resolve()), args.model_rounds) for path in args.models
        }
        for side in sides.values():
            assert side.process.stdin is not None
            side.process.stdin.close()
            side.process.wait()
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
