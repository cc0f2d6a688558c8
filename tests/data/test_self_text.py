"""Text that a model writes itself: its distribution, its cache, and its place in a mix."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import niwaki
from niwaki.compression.run_record import read_run
from niwaki.config.events import silent
from niwaki.config.recipe import Calibration
from niwaki.config.sources import parse_mix
from niwaki.data import self_text
from niwaki.data.self_text import CHUNK, self_windows
from niwaki.data.texts import digest, load_tokenizer, read_calibration, windows_for
from niwaki.errors import CalibrationError, InputError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from support.models import CPU, Warnings, tiny_llama, write_texts

SIZE: dict[str, Any] = {"seq_len": 12, "seed": 0, "device": "cpu", "report": silent}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose logits are large, so that rounding chooses no other token."""
    return tiny_llama(tmp_path_factory.mktemp("self") / "model", blocks=1, initializer_range=0.5)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NIWAKI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/self-text"


def test_every_token_is_where_its_number_falls_in_the_distribution_of_the_model(model: Path) -> None:
    """Compare with a float64 model, which sees every window whole and holds no keys."""
    ids_ST = self_windows(model, (7,), samples=4, **SIZE)
    dense = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    before_ST = torch.cat([torch.full((4, 1), 7), ids_ST], dim=1)
    with torch.no_grad():
        sums_STV = dense(before_ST).logits.softmax(-1)[:, :-1].cumsum(-1)
    uniform_ST = self_text._uniform(range(4), 12, 0)
    wanted_ST = (sums_STV <= uniform_ST[..., None]).sum(-1)
    assert torch.equal(ids_ST, wanted_ST)
    assert len(set(ids_ST.flatten().tolist())) > 12


def test_runs_at_the_same_time_write_a_text_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a second run while the first one writes: it waits, and writes only what it wants beyond."""
    monkeypatch.setattr(self_text, "MAX_CHUNKS", {"cpu": 1, "cuda": 1})
    write, writing, written = self_text._write, threading.Event(), []

    def slow(decoder: Any, start: Any, uniform_BT: torch.Tensor, *others: Any) -> torch.Tensor:
        written.append(uniform_BT[:, 0].tolist())
        if len(written) == 1:
            writing.set()
            assert waiting.wait(20)
        return write(decoder, start, uniform_BT, *others)

    waiting, told = threading.Event(), Warnings()

    def second(event: str, **fields: Any) -> None:
        told(event, **fields)
        if "this one waits" in fields.get("message", ""):
            waiting.set()

    monkeypatch.setattr(self_text, "_write", slow)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(self_windows, model, (7,), samples=2 * CHUNK, **SIZE)
        assert writing.wait(20)
        other = pool.submit(self_windows, model, (7,), samples=3 * CHUNK, **SIZE | {"report": second})
        few, many = one.result(60), other.result(60)
    assert torch.equal(many[: 2 * CHUNK], few) and len(many) == 3 * CHUNK
    assert len(written) == 3 and len({tuple(numbers) for numbers in written}) == 3
    assert sum("another process writes" in message for message in told.warnings) >= 1


def test_windows_do_not_depend_on_the_batch_or_on_their_number(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = self_windows(model, (7,), samples=CHUNK + 3, **SIZE)
    monkeypatch.setenv("NIWAKI_CACHE", str(cache / "other"))
    monkeypatch.setattr(self_text, "MAX_CHUNKS", {"cpu": 1, "cuda": 1})
    assert torch.equal(self_windows(model, (7,), samples=CHUNK + 3, **SIZE), many)
    assert torch.equal(self_windows(model, (7,), samples=2, **SIZE), many[:2])
    assert not torch.equal(self_windows(model, (7,), samples=2, **SIZE | {"seed": 1}), many[:2])


def test_the_cache_is_read_again_and_a_torn_file_is_made_again(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = self_windows(model, (7,), samples=CHUNK + 1, **SIZE)
    files = sorted(cache.rglob("*.safetensors"))
    assert len(files) == 2
    with monkeypatch.context() as patched:
        patched.setattr(self_text, "_load", lambda *_: pytest.fail("the model was loaded"))
        assert torch.equal(self_windows(model, (7,), samples=CHUNK + 1, **SIZE), first)
    files[1].write_bytes(files[1].read_bytes()[:50])
    assert torch.equal(self_windows(model, (7,), samples=CHUNK + 1, **SIZE), first)
    assert len(list(cache.iterdir())) == 1
    self_windows(model, (7,), samples=1, **SIZE | {"seq_len": 5})
    assert len(list(cache.iterdir())) == 2, "other windows have a folder of their own"


def test_a_mix_holds_its_shares_in_a_random_order(model: Path, tmp_path: Path) -> None:
    text = str(write_texts(tmp_path / "text.jsonl"))
    other = str(write_texts(tmp_path / "other.jsonl", first=5))
    decoder = Decoder(Checkpoint.open(model), CPU)
    given = Calibration(files=(text,), samples=16, seq_len=12, mix=("self:0.5", f"{other}:0.25"))
    found = windows_for(given, decoder, seed=3, report=silent)
    assert {name: len(one.ids_ST) for name, one in found.mix.items()} == {"self": 8, other: 4, text: 4}
    assert found.about["mix"]["self"] == {"windows": 8, "sha256": digest(found.mix["self"].ids_ST)}
    rows = [tuple(row) for row in found.ids_ST.tolist()]
    parts = {name: [tuple(row) for row in one.ids_ST.tolist()] for name, one in found.mix.items()}
    assert sorted(rows) == sorted(row for part in parts.values() for row in part)
    first = [next(name for name, part in parts.items() if row in part) for row in rows[:6]]
    assert len(set(first)) > 1, "the sources take turns"
    own = read_calibration(
        (other,), "text", load_tokenizer(model), samples=4, seq_len=12, seed=3, bos="auto", report=silent
    )
    assert torch.equal(found.mix[other].ids_ST, own.ids_ST)
    assert torch.equal(windows_for(given, decoder, seed=3, report=silent).ids_ST, found.ids_ST)


def test_compress_and_its_record_take_a_mix(model: Path, tmp_path: Path) -> None:
    text = str(write_texts(tmp_path / "text.jsonl"))
    given = {"files": (text,), "samples": 8, "seq_len": 12}
    for name, mix in (("plain", ()), ("mixed", "self:0.5")):
        niwaki.compress(
            model, tmp_path / name, method="sparsegpt", target="0.5", device="cpu",
            calibration={**given, "mix": mix},
        )  # fmt: skip
    plain, mixed = (read_run(tmp_path / name) for name in ("plain", "mixed"))
    assert mixed.recipe.calibration.mix == ("self:0.5",) and "mix" not in plain.dump()["recipe"]["calibration"]
    assert mixed.calibration.mix["self"]["windows"] == 4 and "mix" not in plain.dump()["calibration"]
    assert mixed.calibration.sha256 != plain.calibration.sha256


@pytest.mark.parametrize(
    ("mix", "files", "message"),
    [
        (("self",), ("a.txt",), "expected SOURCE:SHARE"),
        (("self:0",), ("a.txt",), "share in"),
        (("self:x",), ("a.txt",), "share in"),
        (("self:nan",), ("a.txt",), "share in"),
        (("self:0.5", "self:0.2"), ("a.txt",), "twice"),
        (("self:0.5", "c4:0.6"), ("a.txt",), "add up to 1.1"),
        (("self:0.5",), (), "no other text for the rest"),
        (("self:1",), ("a.txt",), "leaves no window for a.txt"),
        (("gone.jsonl:0.5",), ("a.txt",), "no such text file: gone.jsonl"),
    ],
)
def test_a_wrong_mix_is_one_line(mix: tuple[str, ...], files: tuple[str, ...], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        parse_mix(mix, files)


def test_a_mix_of_the_model_alone_and_too_few_windows(model: Path) -> None:
    decoder = Decoder(Checkpoint.open(model), CPU)
    alone = windows_for(Calibration(samples=4, seq_len=12, mix=("self:1",)), decoder, seed=0, report=silent)
    none = windows_for(Calibration(samples=4, seq_len=12), decoder, seed=0, report=silent)
    assert torch.equal(alone.ids_ST, none.ids_ST)
    with pytest.raises(InputError, match="1 windows are too few for the mix"):
        windows_for(Calibration(samples=1, seq_len=12, mix=("self:0.5", "c4:0.5")), decoder, seed=0, report=silent)
