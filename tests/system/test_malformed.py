"""Random changes of the JSON of a stranger: every reader ends with a NiwakiError in one line, or reads the folder."""

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import niwaki
from niwaki.compression.verify import check_weights
from niwaki.errors import NiwakiError
from niwaki.measure.report.layers import read_layers
from support.models import tiny_llama, write_texts

ROUNDS = 45  # of each file; a reader that loads the model takes every third
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 10**9, 10**18, -(10**9), 0.5, float("nan"), float("inf"), "", "x", "../up", "\0",
    "float64", [], [1], ["a"], [[[]]], {}, {"a": 1}, {"": {}}, "1" * 300,
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a JSON value, and its own."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in parts for place in places(part, (*path, key)))]


def mutated(content: Any, chosen: random.Random) -> Any:
    """Return a copy with one to three values replaced, removed, renamed or moved."""
    content = json.loads(json.dumps(content))
    for _ in range(chosen.choice([1, 1, 1, 2, 3])):
        path = chosen.choice(places(content))
        if not path:
            if chosen.random() < 0.2:
                return chosen.choice(VALUES)
            continue
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        kind = chosen.random()
        if kind < 0.7:
            parent[path[-1]] = chosen.choice(VALUES)
        elif kind < 0.85:
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[chosen.choice(["x", "", "0", *parent])] = parent.pop(path[-1])
    return content


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, a packed result and a contextual one."""
    folder = tmp_path_factory.mktemp("malformed")
    text = str(write_texts(folder / "text.jsonl"))
    tiny_llama(folder / "model", num_attention_heads=8, num_key_value_heads=4, blocks=2)
    four = {"method": "rtn", "target": "4bit", "options": {"group": 16}, "device": "cpu"}
    niwaki.compress(folder / "model", folder / "packed", **four)
    niwaki.compress(
        folder / "model", folder / "shadowed", method="shadow", target="0.5", device="cpu",
        calibration={"files": (text,), "samples": 12, "seq_len": 24},
        options={"unit": "prompt", "gradient_windows": 4, "min_prompt": 8, "features": "last", "size_frac": 0.5},
    )  # fmt: skip
    return folder


def readers(folder: Path, text: Path) -> dict[str, Callable[[], object]]:
    """Return everything that reads a model or result, in the order of cost."""
    again = {"method": "magnitude", "target": "0.5", "device": "cpu"}
    return {
        "inspect": lambda: niwaki.inspect(folder),
        "layers": lambda: read_layers(folder),
        "verify": lambda: check_weights(folder),
        "plan": lambda: niwaki.plan(folder, method="magnitude", target="0.5", gpu="h100"),
        "load": lambda: niwaki.load(folder, device="cpu"),
        "evaluate": lambda: niwaki.evaluate(folder, data=[str(text)], seq_len=8, max_tokens=8, device="cpu"),
        "export": lambda: niwaki.export(folder, text.with_name("exported"), to="compressed-tensors", overwrite=True),
        "compress": lambda: niwaki.compress(folder, text.with_name("again"), overwrite=True, **again),
    }


@pytest.mark.parametrize(
    ("result", "name"),
    [
        ("model", "config.json"),
        ("packed", "config.json"),
        ("packed", "model.safetensors.index.json"),
        ("packed", "niwaki/run.json"),
        ("packed", "niwaki/blocks.jsonl"),
        ("shadowed", "niwaki/run.json"),
        ("shadowed", "niwaki/shadow.json"),
    ],
)
def test_nothing_but_a_niwaki_error_leaves(world: Path, tmp_path: Path, result: str, name: str) -> None:
    shutil.copytree(world / result, tmp_path / "folder")
    path = tmp_path / "folder" / name
    text = path.read_text()
    lines = text.splitlines() if name.endswith("l") else [text]
    chosen = random.Random(name + result)
    names = list(readers(tmp_path, tmp_path))
    for number in range(ROUNDS):
        where = chosen.randrange(len(lines))
        content = mutated(json.loads(lines[where]), chosen)
        path.write_text("\n".join([*lines[:where], json.dumps(content), *lines[where + 1 :]]))
        cheap, dear = names[:3], names[3:]
        for reader in [*cheap, *([dear[number // 3 % len(dear)]] if number % 3 == 0 else [])]:
            try:
                with contextlib.suppress(NiwakiError):
                    readers(tmp_path / "folder", world / "text.jsonl")[reader]()
            except Exception as error:
                shown = json.dumps(content)[:300]
                pytest.fail(f"{reader} of {name}, round {number}: {type(error).__name__}: {error}\n{shown}")
