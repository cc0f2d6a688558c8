"""Configs that do not fit the tensors of their file are refused before anything is built."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from niwaki.errors import NiwakiError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.complete import names_of
from support.models import tiny_llama

ABSURD: dict[str, Any] = {
    "num_hidden_layers": 10**9,
    "num_attention_heads": 10**9,
    "num_key_value_heads": 10**9,
    "vocab_size": 10**12,
    "hidden_size": 10**12,
    "intermediate_size": 10**12,
    "num_labels": 10**9,
    "head_dim": 10**12,
    "max_position_embeddings": 10**12,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("absurd") / "model")
    names_of(Checkpoint.open(folder))  # imports are not part of a refusal
    return folder


@pytest.mark.parametrize("field", ABSURD)
@pytest.mark.parametrize("sign", [1, -1])
def test_it_is_refused_within_two_seconds(model: Path, tmp_path: Path, field: str, sign: int) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).symlink_to(path)
    content = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(content | {field: sign * ABSURD[field]}))
    begun = time.perf_counter()
    try:
        names_of(Checkpoint.open(tmp_path, model))
    except NiwakiError as error:
        assert "\n" not in str(error)
    else:
        assert field in ("max_position_embeddings", "num_labels"), "no tensor depends on it"
    assert time.perf_counter() - begun < 2


def test_a_limit_of_memory_below_torch_is_one_line(model: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (800 << 20, 800 << 20))

    words = ["compress", str(model), str(tmp_path / "out"), "--method", "magnitude", "--target", "0.5"]
    ended = subprocess.run(
        [sys.executable, "-m", "niwaki.cli", *words], preexec_fn=limit, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "ulimit -v" in ended.stderr
