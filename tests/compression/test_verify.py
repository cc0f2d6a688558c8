"""A result with one byte changed anywhere in its weights is found."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import niwaki
from niwaki.compression import verify
from niwaki.compression.verify import UNVERIFIED, check_weights, replace_files, state_of
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


DECIDING = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "model.safetensors.index.json", "niwaki/blocks.jsonl"]  # fmt: skip


@pytest.mark.parametrize("name", DECIDING)
def test_one_byte_changed_beside_the_weights_is_found(out: Path, name: str) -> None:
    path = out / name
    before = path.read_bytes()
    path.write_bytes(before.replace(b"0", b"1", 1) if b"0" in before else before + b" ")
    with pytest.raises(CheckpointError, match=rf"{name} is not the file that niwaki wrote"):
        check_weights(out)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"misses {name}"):
        check_weights(out)
    path.write_bytes(before)
    assert check_weights(out)


@pytest.mark.parametrize("name", ["chat_template.jinja", "vocab.json", "adapter_config.json", "niwaki/shadow.json"])
def test_a_file_of_a_stranger_is_found(out: Path, name: str) -> None:
    (out / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{name}: .* has no SHA-256 of it"):
        check_weights(out)
    (out / name).unlink()
    (out / "README.md").write_text((out / "README.md").read_text() + "\nmine\n")
    assert check_weights(out), "the card is for people"


def test_an_older_result_says_what_was_not_verified(out: Path) -> None:
    path = out / "niwaki/run.json"
    before = path.read_text()
    content = json.loads(before)
    assert UNVERIFIED not in state_of(out, check_weights(out))
    path.write_text(json.dumps({name: value for name, value in content.items() if name != "files"}))
    assert UNVERIFIED in state_of(out, check_weights(out))
    path.write_text(before)


def test_a_replacement_that_is_killed_at_any_step_still_passes(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill at every rename and every record that `replace_files` writes; the files change together in the end."""

    def write(place: Path) -> None:
        (place / "niwaki").mkdir()
        for name in ("niwaki/blocks.jsonl", "niwaki/evaluation.json"):
            (place / name).write_text(f"{stop}\n")

    class Killed(BaseException):
        pass

    def counted(step: Callable[..., object]) -> Callable[..., object]:
        def run(*given: object, **named: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return step(*given, **named)

        return run

    monkeypatch.setattr(verify, "write_record", counted(verify.write_record))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    stop, finished = 0, False
    while not finished:
        left = stop
        try:
            replace_files(out, write)
            finished = True
        except Killed:
            stop += 1
        assert check_weights(out)
    assert stop >= 5 and (out / "niwaki/evaluation.json").read_text() == f"{stop}\n"
    assert json.loads((out / "niwaki/run.json").read_text())["pending"] == {}


def test_the_model_and_the_predictor_of_a_contextual_result(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model", num_attention_heads=8, num_key_value_heads=4)
    text = str(write_texts(tmp_path / "text.jsonl"))
    niwaki.compress(
        tmp_path / "model", tmp_path / "out", method="shadow", target="0.5", device="cpu",
        calibration={"files": (text,), "samples": 12, "seq_len": 24},
        options={"unit": "prompt", "gradient_windows": 4, "min_prompt": 8, "features": "last", "size_frac": 0.5},
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
