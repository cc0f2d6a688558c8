"""Early bounds never refuse what the whole checks accept, and refuse what is certainly impossible without torch."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import transformers

from niwaki.compression.plan.sizes import sizes_of, stored_sizes
from niwaki.compression.preflight import COUNT_MARGIN, Files, _written, check_early
from niwaki.compression.resolve import resolve
from niwaki.config.recipe import Calibration, Recipe, make_recipe
from niwaki.data.text_amount import check_amount
from niwaki.errors import CalibrationError, InputError, NiwakiError, OutputError, TargetError
from niwaki.methods.method import MethodKind
from niwaki.methods.registry import METHODS, make_steps, merged_needs
from niwaki.model.config_file import read_folder
from niwaki.model.decoder import Decoder, open_decoder
from support.families import GQA, build
from support.models import add_tokenizer, tiny_llama, write_texts

CPU = torch.device("cpu")
CONFIGS = {
    "tied": transformers.LlamaConfig(**GQA, tie_word_embeddings=True),
    "transposed": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64),
    "experts": transformers.MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2),
}
GROUP = {"group": 16}
RECIPES: list[dict[str, Any]] = [
    {"method": "magnitude", "target": "0.5"},
    {"method": "magnitude", "target": "0.5", "pack": "auto"},
    {"method": "magnitude", "target": "2:4", "pack": "auto"},
    {"method": "rtn", "target": "4bit", "options": GROUP},
    {"method": "rtn", "target": "4bit", "options": GROUP, "pack": "none"},
    {"method": "squeeze10", "target": "1.7bit"},
    {"method": "sparsegpt+gptq", "target": "2:4+4bit", "options": {"gptq.group": 16}, "pack": "auto"},
]
usage = namedtuple("usage", "total used free")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("model"), blocks=3)
    add_tokenizer(folder)
    return folder


def _planned_bytes(decoder: Decoder, recipe: Recipe) -> int | None:
    """Return the predicted bytes of a result, None if the recipe does not fit the model."""
    try:
        stage = resolve(recipe, decoder).stages[-1]
        return stored_sizes(decoder, sizes_of(decoder), stage).file_bytes
    except NiwakiError:
        return None


def test_bounds_from_headers_hold_for_families(tmp_path: Path) -> None:
    """Compare least bytes with the predicted ones, and weights counted in headers with those of the anatomy."""
    compared = 0
    for name, config in CONFIGS.items():
        build(config).save_pretrained(tmp_path / name)
        decoder, files = open_decoder(tmp_path / name, CPU), Files.of(read_folder(tmp_path / name)[1])
        assert len(files.blocks) == len(decoder)
        if weights := files.weights():
            assert COUNT_MARGIN * weights <= decoder.anatomy.weights <= weights, name
        for given in RECIPES:
            recipe = make_recipe({**given, "device": "cpu"})
            if (planned := _planned_bytes(decoder, recipe)) is not None:
                compared += 1
                assert _written(recipe, files) <= planned, (name, given)
    assert compared > 15


@pytest.mark.parametrize("given", RECIPES[:1] + RECIPES[3:4])
def test_the_bound_of_a_plain_decoder_is_close(model: Path, given: dict[str, Any]) -> None:
    recipe = make_recipe({**given, "device": "cpu"})
    planned = _planned_bytes(open_decoder(model, CPU), recipe)
    assert planned is not None and _written(recipe, Files.of(read_folder(model)[1])) > 0.6 * planned


def test_methods_say_whether_they_read_text() -> None:
    for name, info in METHODS.items():
        if info.kind is MethodKind.WALK:
            assert info.reads_text == merged_needs(make_steps(name, {}, None)).anything, name
        else:
            assert info.reads_text


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "squeeze10", "target": None, "target_bytes": 10}, TargetError, "expected 1 to 8: give"),
        ({"method": "squeeze10", "target": None, "target_bytes": "1GB"}, TargetError, "expected 1 to 8: give"),
        ({"blocks": "1-9"}, TargetError, "blocks 3-9: the model has blocks 0 to 2"),
        ({"calibration": {"samples": 10**13, "seq_len": 64}}, CalibrationError, "add text, or lower --samples"),
        ({"calibration": {"samples": 10**13, "seq_len": 64, "files": []}}, InputError, "the memory of this machine"),
        ({"calibration": {"samples": 600, "seq_len": 64}}, CalibrationError, "600 windows × 64 need 38,400: add text"),
        ({"calibration": {"samples": 4, "seq_len": 65}}, CalibrationError, "longer than the 64 positions"),
    ],
)
def test_impossible_jobs_are_refused(
    model: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    few = {"samples": 2, "seq_len": 16, "files": [str(write_texts(tmp_path / "text.jsonl"))]}
    possible: dict[str, Any] = {"method": "wanda", "target": "0.5", "device": "cpu", "calibration": few}
    check_early(str(model), make_recipe(possible), None)
    changes = {**changes, "calibration": {**few, **changes.get("calibration", {})}}
    with pytest.raises(error, match=message):
        check_early(str(model), make_recipe({**possible, **changes}), None)


def test_a_full_disk_and_a_small_memory_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe({"method": "magnitude", "target": "0.5", "device": "cpu"})
    check_early(str(model), recipe, tmp_path / "out")
    nbytes = (model / "model.safetensors").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, nbytes // 4))
    with pytest.raises(OutputError, match="the result needs"):
        check_early(str(model), recipe, tmp_path / "out")
    check_early(str(model), recipe, tmp_path / "out", here=False)
    (tmp_path / "out.partial").mkdir()
    check_early(str(model), recipe, tmp_path / "out")  # it may hold most of the result
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=10**4))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=0))
    with pytest.raises(InputError, match="the memory of this machine"):
        check_early(str(model), recipe, None)


def test_text_is_refused_only_where_its_tokens_are_known(model: Path, tmp_path: Path) -> None:
    """Accept dialogues, data sets and nearly enough text, and bound a large file by its bytes."""
    config = json.loads((model / "config.json").read_text())

    def check(path: Path, samples: int, folder: Path = model) -> None:
        check_amount(Calibration(files=(str(path),), samples=samples, seq_len=64), config, folder)

    dialogue = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    chats = tmp_path / "chats.jsonl"
    chats.write_text(f"{json.dumps(dialogue)}\n" * 5)
    check(chats, 10**6)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(f'{json.dumps(dialogue)}\n{{"text": "some"}}\n')
    check(mixed, 10**6)
    (tmp_path / "set").mkdir()
    check(tmp_path / "set", 10**6)
    long = tmp_path / "long.txt"
    long.write_text("word " * 300_000)
    check(long, 20_000)
    with pytest.raises(CalibrationError, match=r"at most 3,000,000 tokens, 1000000 windows × 64 need 64,000,000"):
        check(long, 10**6)
    bare = tiny_llama(tmp_path / "bare", blocks=1)
    (bare / "tokenizer.json").unlink(missing_ok=True)
    check(write_texts(tmp_path / "short.jsonl"), 10**6, bare)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"other": "text"}\n')
    with pytest.raises(CalibrationError, match="none can be used"):
        check(empty, 1)
