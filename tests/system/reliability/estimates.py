"""Test 10: estimates of memory and disk before a run against the run, and jobs that cannot be done."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.checkpoints import write_topics
from benchmarks.speed.plan import case
from niwaki.cli.demo import sapling
from support.models import tiny_llama, write_texts
from tests.system.reliability.commands import Row
from tests.system.reliability.interrupted import _disk

LIMIT_S = 5.0
CHOSEN = ("magnitude", "wanda-owl", "sparsegpt", "gptq", "comp", "flap", "shadow", "comp+gptq")
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4,
         "max_position_embeddings": 512}  # fmt: skip
TRIES = 3  # of which the fastest counts: other work shares the machine


def preflight() -> Row:
    """Run test 10: `niwaki plan` before `niwaki compress` of the sapling, then impossible jobs."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_topics(folder / "text.jsonl")
        ratios = {}
        for name in CHOSEN:
            ratios[name] = case(name, sapling(), folder / "text.jsonl", folder / "out")["ratio"]
            print(name, ratios[name], file=sys.stderr, flush=True)
        on_gpu = {}
        if torch.cuda.is_available():
            model = tiny_llama(folder / "large", dtype=torch.bfloat16, blocks=8, **LARGE)
            for name in CHOSEN:
                on_gpu[name] = case(name, model, folder / "text.jsonl", folder / "out", "cuda")["ratio"]
                print(name, "on the GPU", on_gpu[name], file=sys.stderr, flush=True)
        refused = {name: _refused(arguments, limit) for name, (arguments, limit) in _impossible(folder).items()}
        with _disk(folder, 2**20) if os.geteuid() == 0 else contextlib.nullcontext(None) as disk:
            if disk is not None:
                refused["a disk of 1 MB"] = _refused(["compress", sapling(), disk / "out", *MAGNITUDE])
    off = {key: max(abs(own[key] - 1) for own in ratios.values()) for key in ("peak_rss_bytes", "output_bytes")}
    vram = max((abs(own["peak_device_bytes"] - 1) for own in on_gpu.values()), default=0.0)
    quick = [one["code"] == 2 and one["seconds"] <= LIMIT_S for one in refused.values()]
    slowest = max(one["seconds"] for one in refused.values())
    memory = f"RAM within {off['peak_rss_bytes']:.1%}" + (f", VRAM within {vram:.1%}" if on_gpu else "")
    ended = sum(one["code"] == 2 for one in refused.values())
    return {
        "what": f"`niwaki plan`, then `niwaki compress` of the sapling, {len(ratios)} methods and chains, fresh "
        f"processes; then jobs that cannot be done (fastest of {TRIES}, imports included)",
        "reached": f"{memory}, disk within {off['output_bytes']:.1%} in {len(ratios)} cases; {ended} of {len(refused)} "
        f"impossible jobs refused, {sum(quick)} within {LIMIT_S:.0f} s, the slowest in {slowest:.1f} s",
        "figure": {"predicted_over_measured": ratios, "on_the_gpu": on_gpu, "refused": refused},
        "passed": max(*off.values(), vram) <= 0.15 and all(quick),
        **({} if on_gpu else {"not_run": "VRAM: this machine has no GPU"}),
    }


MAGNITUDE = ["--method", "magnitude", "--target", "0.5", "--device", "cpu"]


def _impossible(folder: Path) -> dict[str, tuple[list[object], int | None]]:
    """Return jobs that no run could do, with a limit of the address space for those that need one."""
    model, text = tiny_llama(folder / "model", blocks=1), write_texts(folder / "short.jsonl")
    path = model / "config.json"
    deep = tiny_llama(folder / "deep", blocks=1)
    (deep / "config.json").write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10**9}))
    wide = tiny_llama(folder / "wide", blocks=1)
    (wide / "config.json").write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 2**40}))
    out, tree = folder / "impossible", sapling()
    wanda = ["--method", "wanda", "--target", "0.5", "--calibration", text, "--device", "cpu"]
    found: dict[str, tuple[list[object], int | None]] = {
        "a billion blocks": (["compress", deep, out, *MAGNITUDE], None),
        "a vocabulary of 2^40": (["compress", wide, out, *MAGNITUDE], None),
        "windows beyond the memory": (["compress", tree, out, *wanda, "--samples", 10**9], None),
        "0.8 GB of address space": (["compress", tree, out, *MAGNITUDE], 800_000_000),
        "fewer bytes than the codes take": (
            ["compress", tree, out, "--method", "squeeze10", "--target-bytes", "10KB", "--calibration", text], None,
        ),
        "0 bits": (["compress", tree, out, "--method", "rtn", "--target", "0bit"], None),
        "OUT in a folder that is not there": (["compress", tree, folder / "none/out", *MAGNITUDE], None),
        "a model that is not there": (["compress", folder / "none", out, *MAGNITUDE], None),
        "a text that is too short": (["compress", tree, out, *wanda, "--samples", 10**6, "--seq-len", 512], None),
    }  # fmt: skip
    if not torch.cuda.is_available():
        found["a GPU that is not there"] = (["compress", tree, out, *MAGNITUDE[:-1], "cuda"], None)
    return found


def _refused(arguments: list[object], address_space: int | None = None) -> dict[str, Any]:
    """Run the command line in fresh processes and return the end of the fastest."""
    command = [sys.executable, "-m", "niwaki.cli", *map(str, arguments)]
    before: Callable[[], None] | None = None
    if address_space is not None:
        before = lambda: resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))  # noqa: E731
    ends = []
    for _ in range(TRIES):
        began = time.monotonic()
        ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=before, timeout=120)
        last = ["", *ended.stderr.strip().splitlines()][-1]
        ends.append({"seconds": round(time.monotonic() - began, 2), "code": ended.returncode, "said": last[-160:]})
        if ends[-1]["seconds"] <= LIMIT_S:
            break
    return min(ends, key=lambda end: float(end["seconds"]))
