"""Tests 9 and 11: weights, activations and statistics that are strange, and the same run twice."""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from niwaki.methods.registry import METHODS
from support.models import file_bytes, tiny_llama, write_texts
from tests.system.reliability.commands import Row, niwaki

WEIGHTS = "model.safetensors"
TARGETS: dict[str, str] = {
    **dict.fromkeys(("arb", "billm", "ptq161", "trellis"), "8bit"),
    **dict.fromkeys(("gptq", "rtn", "squeeze10"), "4bit"),
    **dict.fromkeys(("comp", "flap", "two_ssp", "wanda_sp"), "0.3"), "shortgpt": "0.34",
}  # fmt: skip
OPTIONS: dict[str, tuple[str, ...]] = {  # the groups of a small model, and less to learn
    "arb": ("salient=8", "iterations=3"), "besa": ("steps=8",), "billm": ("salient=8",), "comp": ("try_heads=0",),
    "gptq": ("group=0",), "ptq161": ("rounds=1", "samples=4"), "rtn": ("group=0",),
    "shadow": ("unit=prompt", "min_prompt=8", "features=last", "size_frac=0.5", "gradient_windows=4"),
    "squeeze10": ("rounds=1", "learn_rounds=1", "samples=4"), "trellis": ("rounds=1", "learn_rounds=1", "samples=4"),
    "wandapp": ("rounds=2", "samples=4"),
}  # fmt: skip
FRESH = ("besa", "comp", "shadow", "sparsegpt", "squeeze10")  # also in a process of its own
SIZE = ("--samples", 12, "--seq-len", 24)
Tensors = dict[str, Tensor]


def _model(folder: Path) -> Path:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
    return tiny_llama(folder, **shape)


def _compression(method: str, model: Path, out: Path, text: Path, size: tuple[object, ...] = SIZE) -> list[object]:
    given = [word for option in OPTIONS.get(method, ()) for word in ("--set", option)]
    target = TARGETS.get(method, "0.5")
    fixed = ["--calibration", text, "--device", "cpu", "--overwrite"]
    return ["compress", model, out, "--method", method, "--target", target, *given, *size, *fixed]


def _strange() -> dict[str, tuple[Callable[[Tensors], object], bool]]:
    """Return changes of weights, and whether every reader must refuse them."""
    up, norm = "model.layers.1.mlp.up_proj.weight", "model.layers.{}.input_layernorm.weight"

    def overflowing(tensors: Tensors) -> None:
        for name in ("up_proj", "gate_proj"):
            tensors[f"model.layers.1.mlp.{name}.weight"].mul_(1e22)

    def dead(tensors: Tensors) -> None:
        for index in range(3):
            tensors[norm.format(index)][::3] = 0
            tensors[f"model.layers.{index}.post_attention_layernorm.weight"][::3] = 0
            tensors[f"model.layers.{index}.mlp.up_proj.weight"][::4] = 0

    return {
        "NaN in a weight": (lambda tensors: tensors[up][3, 4].fill_(float("nan")), True),
        "Inf in a weight": (lambda tensors: tensors[up][3, 4].fill_(float("inf")), True),
        "activations overflow": (overflowing, False),
        "dead channels": (dead, False),
        "a matrix of zeros": (lambda tensors: tensors[up].zero_(), False),
        "tiny weights": (lambda tensors: tensors[up].mul_(1e-42), False),
        "rank-deficient H": (lambda tensors: None, False),
    }


def strange() -> Row:
    """Run test 9: every method on every strange model."""
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text, plain = write_texts(folder / "text.jsonl"), _model(folder / "plain")
        for kind, (change, _) in _strange().items():
            model = _model(folder / kind.replace(" ", "-"))
            tensors = load_file(plain / WEIGHTS)
            change(tensors)
            save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
            size = ("--samples", 1, "--seq-len", 24) if kind == "rank-deficient H" else SIZE
            found[kind] = {}
            for method in METHODS:
                ended = niwaki(*_compression(method, model, folder / "out", text, size))
                found[kind][method] = _outcome(ended.code, ended.last, folder / "out")
                if not ended.clean:
                    print(kind, method, ended.err[-2000:], file=sys.stderr)
    ends = Counter(outcome.partition(":")[0] for own in found.values() for outcome in own.values())
    must = [outcome for kind, own in found.items() if _strange()[kind][1] for outcome in own.values()]
    return {
        "what": f"{len(METHODS)} methods on tiny models: {', '.join(found)} (one window of 24 tokens for 64 columns)",
        "reached": f"{ends.total()} runs: {ends['finite']} with finite output, {ends['named error']} with a named "
        f"error, {ends.total() - ends['finite'] - ends['named error']} others",
        "figure": {"runs": found},
        "passed": set(ends) <= {"finite", "named error"} and all(one.startswith("named error") for one in must),
    }


def _outcome(code: int, last: str, out: Path) -> str:
    if code == 0:
        tensors = [tensor for path in out.rglob("*.safetensors") for tensor in load_file(path).values()]
        real = [tensor for tensor in tensors if tensor.is_floating_point()]
        return "finite" if real and all(bool(tensor.isfinite().all()) for tensor in real) else "not finite"
    named = code == 2 and any(
        word in last for word in ("finite", "NaN", "infinite", "model.layers", "block", "windows")
    )
    return f"{'named error' if named else f'code {code}'}: {last[-200:]}"


def twice() -> Row:
    """Run test 11: every method two times in children, some in a fresh process with other hashes of strings too."""
    found: dict[str, dict[str, bool]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text, model = write_texts(folder / "text.jsonl"), _model(folder / "model")
        for method in METHODS:
            first, second, third = (folder / method / name for name in ("first", "second", "third"))
            first.parent.mkdir()
            for out in (first, second):
                assert niwaki(*_compression(method, model, out, text)).code == 0, method
            if method in FRESH:
                command = [sys.executable, "-m", "niwaki.cli", *map(str, _compression(method, model, third, text))]
                fresh = {**os.environ, "PYTHONHASHSEED": "12345"}
                subprocess.run(command, check=True, capture_output=True, env=fresh)
            else:
                third = second
            found[method] = {
                "masks": _masks(first) == _masks(second) == _masks(third),
                "bytes": file_bytes(first) == file_bytes(second) == file_bytes(third),
            }
    same = {what: sum(one[what] for one in found.values()) for what in ("masks", "bytes")}
    return {
        "what": f"{len(found)} methods, each twice with one seed; {len(FRESH)} also in a fresh process",
        "reached": f"identical masks for {same['masks']} of {len(found)} methods, identical bytes of all files for "
        f"{same['bytes']}",
        "figure": {"methods": found},
        "passed": same["masks"] == same["bytes"] == len(found),
    }


def _masks(out: Path) -> dict[str, Any]:
    """Return where each tensor of a result is zero."""
    return {
        name: torch.eq(tensor, 0).numpy().tobytes()
        for path in sorted(out.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
