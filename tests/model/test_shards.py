"""One reader for all: a broken folder is refused with one line wherever it is read."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import niwaki
from niwaki.errors import CheckpointError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.shards import INDEX, SINGLE, numbered
from niwaki.serve.server import ServerSettings, make_service
from support.models import tiny_llama, write_texts

NAME = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("shards") / "model")


@pytest.fixture
def model(plain: Path, tmp_path: Path) -> Path:
    shutil.copytree(plain, tmp_path / "model")
    return tmp_path / "model"


def write(path: Path, tensors: Tensors) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def split(folder: Path) -> dict[str, str]:
    """Cut the model into two shards and an index, and return the shard of every tensor."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    (folder / SINGLE).unlink()
    where = {name: "a.safetensors" if place < len(names) // 2 else "b.safetensors" for place, name in enumerate(names)}
    for shard in ("a.safetensors", "b.safetensors"):
        write(folder / shard, {name: tensor for name, tensor in tensors.items() if where[name] == shard})
    put_index(folder, where)
    return where


def put_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    write(folder / SINGLE, tensors)


def set_config(folder: Path, **fields: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | fields))


def fill(folder: Path, value: float) -> None:
    change(folder, lambda tensors: tensors[NAME][2, 3].fill_(value))


def two_answers(folder: Path) -> None:
    shutil.copy(folder / SINGLE, folder / "whole.safetensors")
    split(folder)
    (folder / "whole.safetensors").rename(folder / SINGLE)


def wrong_shard(folder: Path) -> None:
    where = split(folder)
    put_index(folder, where | {NAME: "b.safetensors" if where[NAME] == "a.safetensors" else "a.safetensors"})


def twice(folder: Path) -> None:
    where = split(folder)
    other = "b.safetensors" if where[NAME] == "a.safetensors" else "a.safetensors"
    write(folder / other, load_file(folder / other) | {NAME: torch.zeros(48, 32)})


def linked(folder: Path) -> None:
    (folder / SINGLE).rename(folder.with_name("elsewhere.safetensors"))
    (folder / SINGLE).symlink_to(folder.with_name("elsewhere.safetensors"))


def linked_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder.with_name("secret.json"))
    (folder / "tokenizer.json").symlink_to(folder.with_name("secret.json"))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "nan": (lambda folder: fill(folder, float("nan")), rf"{NAME} holds NaN or infinite"),
    "inf": (lambda folder: fill(folder, float("-inf")), rf"{NAME} holds NaN or infinite"),
    "missing": (lambda folder: change(folder, lambda tensors: tensors.pop(NAME)), rf"lacks 1 tensor.*{NAME}"),
    "float64": (
        lambda folder: change(folder, lambda tensors: tensors.update({NAME: tensors[NAME].double()})),
        rf"{NAME} is stored as F64",
    ),
    "all float64": (
        lambda folder: change(folder, lambda tensors: tensors.update({n: t.double() for n, t in tensors.items()})),
        "F64",
    ),
    "two answers": (two_answers, r"holds model\.safetensors and an index of other files"),
    "wrong shard": (wrong_shard, rf"the index lists {NAME} in"),
    "twice": (twice, rf"{NAME} is in a\.safetensors and in b\.safetensors"),
    "other weights named": (
        lambda folder: set_config(folder, transformers_weights="other.safetensors"),
        "names other weights",
    ),
    "linked": (linked, "is a link out of its folder"),
    "linked tokenizer": (linked_tokenizer, "is a link out of its folder"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_every_reader_refuses_it(model: Path, tmp_path: Path, kind: str) -> None:
    break_it, message = BROKEN[kind]
    break_it(model)
    text = str(write_texts(tmp_path / "text.jsonl"))
    readers: dict[str, Callable[[], object]] = {
        "load": lambda: niwaki.load(model, device="cpu"),
        "generate": lambda: niwaki.generate(model, "a", max_new_tokens=1, device="cpu"),
        "evaluate": lambda: niwaki.evaluate(model, data=[text], seq_len=16, max_tokens=32, device="cpu"),
        "compress": lambda: niwaki.compress(model, tmp_path / "out", method="magnitude", target="0.5", device="cpu"),
        "serve": lambda: make_service(model, ServerSettings(device="cpu")),
    }
    for name, read in readers.items():
        with pytest.raises(CheckpointError, match=message):
            read()
            pytest.fail(f"{name} read it")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", "modeling_own.py", "more.py"]
)
def test_a_file_outside_is_refused_before_it_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The files that an `auto_map` names are looked for early, in all the JSON and in the imports of the code."""
    set_config(model, auto_map={"AutoModel": "modeling_own.Own"})
    (model / "modeling_own.py").write_text("from .more import thing")
    (model / "more.py").write_text("")
    (model / name).rename(tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    opened, real = [], io.open

    def noted(file: Any, *args: Any, **more: Any) -> Any:
        opened.append(Path(file).resolve() if isinstance(file, str | Path) else file)
        return real(file, *args, **more)

    monkeypatch.setattr(io, "open", noted)
    with pytest.raises(CheckpointError, match=rf"{name} is a link out of its folder"):
        Checkpoint.open(model)
    assert tmp_path / name not in opened
    (tmp_path / name).read_text()
    assert tmp_path / name in opened


def test_shards_with_an_index_read_the_same(plain: Path, model: Path) -> None:
    split(model)
    one, other = niwaki.load(plain, device="cpu").state_dict(), niwaki.load(model, device="cpu").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_layout_of_the_cache_of_the_hub_is_read(plain: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(plain.iterdir()):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert Checkpoint.open(snapshot).tensors
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(plain / SINGLE)
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        Checkpoint.open(snapshot)


def test_a_link_inside_the_folder_is_read(model: Path) -> None:
    (model / SINGLE).rename(model / "weights")
    (model / SINGLE).symlink_to("weights")
    assert Checkpoint.open(model).tensors


WEIGHT_MAPS = ["[]", '{"a": 1}', '{"a": ["b"]}', '{"a": {}}', "null", '{"a": "\\u0000.safetensors"}', "{}"]
MALFORMED = ["[]", "null", "{", "[" * 100_000, "\ufeff{}", *(f'{{"weight_map": {value}}}' for value in WEIGHT_MAPS)]


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_index_is_one_line(model: Path, text: str) -> None:
    (model / SINGLE).rename(model / "a.safetensors")
    (model / INDEX).write_text(text)
    with pytest.raises(CheckpointError) as found:
        Checkpoint.open(model)
    assert str(found.value).count("\n") == 0 and INDEX in str(found.value)


def test_the_longest_numbered_list() -> None:
    assert numbered([]) == 0
    assert numbered(["a.0.x", "a.1.x", "a.1.y", "b.0.c.0", "b.0.c.1", "b.0.c.2"]) == 3
