"""A result with one byte changed anywhere in its weights is found."""

import json
import random
from pathlib import Path

import pytest

import niwaki
from niwaki.compression.verify import check_weights
from niwaki.errors import CheckpointError
from support.models import tiny_llama, write_texts

FLIPS = 100


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("integrity")
    niwaki.compress(tiny_llama(folder / "model"), folder / "out", method="magnitude", target="0.5", device="cpu")
    return folder / "out"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_what_was_written_passes_and_a_dense_model_is_not_known(out: Path) -> None:
    assert check_weights(out) == sum(path.stat().st_size for path in shards(out))
    assert check_weights(out.with_name("model")) is None


def test_one_byte_flipped_in_each_shard_is_found(out: Path) -> None:
    chosen = random.Random(0)
    assert len(shards(out)) > 1
    for path in shards(out):
        size = path.stat().st_size
        for at in [0, size - 1, *(chosen.randrange(size) for _ in range(FLIPS - 2))]:
            flip(path, at)
            with pytest.raises(CheckpointError) as found:
                check_weights(out)
            assert str(path) in str(found.value) and "expected SHA-256" in str(found.value)
            flip(path, at)
    check_weights(out)


def test_a_shard_that_is_missing_or_of_another_run(out: Path) -> None:
    path = shards(out)[0]
    path.rename(out / "away")
    with pytest.raises(CheckpointError, match=f"misses {path.name}"):
        check_weights(out)
    (out / "away").rename(path)
    (out / "other.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"other\.safetensors: .* has no SHA-256 of it"):
        check_weights(out)
    (out / "other.safetensors").unlink()


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"result": {}}', '{"result": null}'])
def test_a_record_without_hashes(out: Path, text: str) -> None:
    path = out / "niwaki/run.json"
    before = path.read_text()
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"cannot be read|has no SHA-256"):
        check_weights(out)
    path.write_text(before)
    assert check_weights(out)


def test_the_model_and_the_predictor_of_a_contextual_result(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model", num_attention_heads=8, num_key_value_heads=4)
    text = str(write_texts(tmp_path / "text.jsonl"))
    niwaki.compress(
        tmp_path / "model", tmp_path / "out", method="shadow", target="0.5", device="cpu",
        calibration={"files": (text,), "samples": 12, "seq_len": 24},
        options={"gradient_windows": 4, "min_prompt": 8, "features": "last", "size_frac": 0.5},
    )  # fmt: skip
    out = tmp_path / "out"
    files = [*shards(out), out / "niwaki/shadow.safetensors"]
    assert set(json.loads((out / "niwaki/run.json").read_text())["result"]["sha256"]) == {
        str(path.relative_to(out)) for path in files
    }
    for path in files:
        flip(path, path.stat().st_size // 2)
        with pytest.raises(CheckpointError, match=path.name):
            check_weights(out)
        flip(path, path.stat().st_size // 2)
    check_weights(out)
