"""Tests 6 and 7: pickles and code that come with a model, or in the place of texts and adapters, are never run."""

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.models import tiny_llama, write_texts
from tests.system.reliability.commands import Row, niwaki
from tests.system.serving.served import free_port, serving

CODE = ("modeling_own.py", "configuration_own.py", "tokenization_own.py", "custom_generate/generate.py")


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def _commands(model: Path, text: Path, folder: Path) -> dict[str, list[object]]:
    """Return every command that reads a model."""
    small = ["--seq-len", 16, "--device", "cpu"]
    return {
        "inspect": ["inspect", model],
        "plan": ["plan", model, "--method", "magnitude", "--target", "0.5", "--gpu", "cpu"],
        "generate": ["generate", model, "a", "--max-new-tokens", 1, "--device", "cpu"],
        "evaluate": ["evaluate", model, "--data", text, "--max-tokens", 32, *small],
        "compare": ["compare", model, model, "--data", text, "--rounds", 0, "--max-tokens", 32, *small],
        "compress": [
            "compress", model, folder / "out", "--method", "wanda", "--target", "0.5", "--calibration", text,
            "--samples", 2, "--overwrite", *small,
        ],
        "export": ["export", model, folder / "exported", "--to", "gguf", "--overwrite"],
    }  # fmt: skip


def pickles() -> Row:
    """Run test 6: pickles beside the weights, instead of them, as an adapter and as a text."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text, sung = write_texts(folder / "text.jsonl"), folder / "sung"
        song = pickle.dumps(Canary(sung))
        for name, place in _pickled().items():
            model = tiny_llama(folder / name.replace(" ", "-"), blocks=1)
            own_text = place(model, song, text)
            codes = {}
            for command, arguments in _commands(model, own_text, folder).items():
                codes[command] = _end(arguments)
            codes["serve"] = _serve(model)
            found[name] = codes
        executed = sung.exists()
        pickle.loads(song)
        control = sung.exists()
    runs = [end for codes in found.values() for end in codes.values()]
    return {
        "what": f"pickles that leave a mark: {', '.join(found)}; {len(next(iter(found.values())))} commands each",
        "reached": f"{len(runs)} runs: {int(executed)} executions, {runs.count('refused')} refused, "
        f"{runs.count('done')} done from the safetensors beside",
        "figure": {"runs": found, "executions": int(executed), "the_mark_is_left_when_loaded": control},
        "passed": control and not executed and set(runs) <= {"refused", "done"}
        and set(found["instead of the weights"].values()) == {"refused"},
    }  # fmt: skip


def _pickled() -> dict[str, Callable[[Path, bytes, Path], Path]]:
    """Return the places of a pickle, as functions that put it there and return the text to read."""
    names = ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pkl", "consolidated.00.pth")

    def beside(model: Path, song: bytes, text: Path) -> Path:
        for name in names:
            (model / name).write_bytes(song)
        return text

    def instead(model: Path, song: bytes, text: Path) -> Path:
        (model / "model.safetensors").unlink()
        return beside(model, song, text)

    def indexed(model: Path, song: bytes, text: Path) -> Path:
        where = {"model.embed_tokens.weight": "pytorch_model.bin"}
        (model / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        return beside(model, song, text)

    def under_its_name(model: Path, song: bytes, text: Path) -> Path:
        (model / "model.safetensors").write_bytes(song)
        return text

    def adapter(model: Path, song: bytes, text: Path) -> Path:
        (model / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]})
        )
        (model / "adapter_model.bin").write_bytes(song)
        return text

    def as_text(model: Path, song: bytes, text: Path) -> Path:
        path = model.with_name(f"{model.name}.pkl")
        path.write_bytes(song)
        return path

    return {
        "beside the weights": beside, "instead of the weights": instead, "in the index": indexed,
        "named as the weights": under_its_name, "as an adapter": adapter, "as a text": as_text,
    }  # fmt: skip


def _end(arguments: list[object]) -> str:
    ended = niwaki(*arguments)
    return {0: "done", 2: "refused"}.get(ended.code, f"{ended.code}: {ended.last}"[:200])


def _serve(model: Path) -> str:
    """Start `niwaki serve` as a process of its own, until it is ready or refuses."""
    try:
        with serving(model, free_port(), "--name", "m"):
            return "done"
    except RuntimeError:
        return "refused"


def auto_map() -> Row:
    """Run test 7: repositories whose configs name code, in a child and by `python -O`."""
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text, sung = write_texts(folder / "text.jsonl"), folder / "sung"
        for name, known in ("a known type", True), ("a type of its own", False):
            model = _with_code(tiny_llama(folder / name.replace(" ", "-"), blocks=1), sung, known)
            commands = _commands(model, text, folder)
            found[name] = {command: _end(arguments) for command, arguments in commands.items()}
            found[name]["serve"] = _serve(model)
            found[f"{name}, python -O"] = {
                command: _optimized(arguments) for command, arguments in commands.items() if command != "compare"
            }
        executed = sung.exists()
    runs = [end for codes in found.values() for end in codes.values()]
    foreign = {end for name, codes in found.items() if "of its own" in name for end in codes.values()}
    return {
        "what": "folders whose config and tokenizer name code in `auto_map`, with that code in them: a known type and "
        "an unknown one, in Python and `python -O`",
        "reached": f"{len(runs)} runs: {int(executed)} executions, {runs.count('refused')} refused, "
        f"{runs.count('done')} done with transformers' own class",
        "figure": {"runs": found, "executions": int(executed)},
        "passed": not executed and set(runs) <= {"refused", "done"} and foreign == {"refused"},
    }


def _with_code(model: Path, sung: Path, known: bool) -> Path:
    """Give a model code that leaves a mark, and configs that name it."""
    code = f"import os\nos.makedirs({str(sung)!r}, exist_ok=True)\n"
    for name in CODE:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(code)
    own: dict[str, dict[str, Any]] = {
        "config.json": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]},
    }
    for name, named in own.items():
        given = json.loads((model / name).read_text()) | {"auto_map": named}
        if not known and name == "config.json":
            given |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
        (model / name).write_text(json.dumps(given))
    return model


def _optimized(arguments: list[object]) -> str:
    """Run the command line in `python -O`, where assertions are gone."""
    command = [sys.executable, "-O", "-m", "niwaki.cli", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True)
    last = ["", *ended.stderr.strip().splitlines()][-1]
    return {0: "done", 2: "refused"}.get(ended.returncode, f"{ended.returncode}: {last}"[:200])
