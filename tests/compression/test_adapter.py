"""Adapters in a model folder: refused by every command, merged by `--merge-adapter` as peft applies them."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import niwaki
from niwaki.compression.run_record import read_run
from niwaki.config.events import silent
from niwaki.config.recipe import Calibration
from niwaki.errors import CheckpointError, InputError, NumericalError
from niwaki.model.checkpoint import Checkpoint
from niwaki.runtime.adapter import merged_model
from support.models import run, tiny_llama, weights_of, write_texts

peft = pytest.importorskip("peft")
IDS_BT = torch.arange(5, 29).view(2, 12)
WANDA: dict[str, Any] = {"method": "wanda", "target": "0.5"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_texts(tmp_path_factory.mktemp("texts") / "text.jsonl"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS_BT, use_cache=False).logits
    return found


def trained(base: Path, folder: Path, rows: int = 0, **settings: Any) -> Tensor:
    """Save a random adapter of `base` to `folder`, and return the logits with it."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_alpha=32, task_type="CAUSAL_LM", **settings)
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))
    return logits(adapted.eval())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def beside(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """Return a folder with weights and an adapter, and the logits of both together."""
    folder = tmp_path_factory.mktemp("models") / "beside"
    shutil.copytree(base, folder)
    return folder, trained(base, folder, target_modules=["q_proj", "v_proj"])


COMMANDS: dict[str, list[str]] = {
    "generate": ["generate", "{model}", "The"],
    "evaluate": ["evaluate", "{model}", "--data", "{text}"],
    "compress": ["compress", "{model}", "{tmp}/out", "--method", "wanda", "--target", "0.5"],
    "compare": ["compare", "{model}", "{base}", "--data", "{text}"],
    "compare result": ["compare", "{base}", "{model}", "--data", "{text}"],
    "plan": ["plan", "{model}", "--method", "wanda", "--target", "0.5"],
    "export": ["export", "{model}", "{tmp}/out", "--to", "gguf"],
    "serve": ["serve", "{model}"],
    "bench": ["bench", "{model}"],
    "recover": ["recover", "{model}", "{tmp}/out", "--data", "{text}"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_an_adapter_beside_weights(
    name: str, beside: tuple[Path, Tensor], base: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"model": beside[0], "base": base, "text": text, "tmp": tmp_path}
    code, _, err = run(capsys, *(one.format(**places) for one in COMMANDS[name]))
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert "holds an adapter (adapter_config.json: LORA, rank 4) beside its weights" in err and "--merge-adapter" in err
    assert not list(tmp_path.iterdir())


def test_python_refuses_it_and_an_adapter_alone_names_its_base(
    beside: tuple[Path, Tensor], base: Path, tmp_path: Path
) -> None:
    for function in niwaki.load, Checkpoint.open:
        with pytest.raises(CheckpointError, match="beside its weights"):
            function(beside[0])
    trained(base, tmp_path / "alone", target_modules=["q_proj"])
    with pytest.raises(CheckpointError) as refused:
        niwaki.load(tmp_path / "alone")
    assert f"is an adapter (LORA, rank 4) for the model {base} and holds no model itself" in str(refused.value)
    assert f"`niwaki compress {tmp_path / 'alone'} OUT --merge-adapter" in str(refused.value)


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "more tokens": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"], "rows": 4100},
    "tied head trained": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "tied": True},
    "tied embeddings adapted": {"target_modules": ["q_proj", "embed_tokens"], "tied": True},
    "tied head adapted": {"target_modules": ["q_proj", "lm_head"], "tied": True},
    "tied, more tokens": {"target_modules": ["q_proj"], "rows": 4100, "tied": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_computes_what_the_adapter_does(kind: str, tmp_path: Path) -> None:
    settings = dict(KINDS[kind])
    tied = settings.pop("tied", False)
    base = tiny_llama(tmp_path / "base", tie_word_embeddings=tied)
    wanted = trained(base, tmp_path / "adapter", **settings)
    with merged_model(tmp_path / "adapter", tmp_path / "merged", silent) as folder:
        found = logits(niwaki.load(folder, device="cpu"))
        still_tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))
    assert still_tied is (kind == "tied, more tokens")
    assert not (tmp_path / "merged").exists()


def test_a_compression_merges_first_and_records_it(
    beside: tuple[Path, Tensor], base: Path, text: str, tmp_path: Path
) -> None:
    folder, _ = beside
    tower = tmp_path / "model"
    shutil.copytree(folder, tower)
    path = tower / "model.safetensors"
    save_file({**load_file(path), "mtp.head": torch.arange(4)}, path, {"format": "pt"})
    calibration = Calibration(files=(text,), samples=8, seq_len=32)
    out = tmp_path / "out"
    niwaki.compress(tower, out, merge_adapter=True, calibration=calibration, **WANDA)
    record = read_run(out)
    assert record.model.source == str(tower)
    adapter = record.model.adapter
    assert adapter is not None and (adapter.type, adapter.rank, adapter.base_named) == ("LORA", 4, str(base))
    assert len(adapter.sha256) == 64 and adapter.source == adapter.base == str(tower)
    card = (out / "README.md").read_text()
    assert "adapter merged before | `model` (LORA, rank 4, SHA-256" in card
    assert not list(out.rglob("adapter_*")) and not list(tmp_path.glob("out.*"))
    assert torch.equal(weights_of(out)["mtp.head"], torch.arange(4))
    plain = tmp_path / "plain"
    with merged_model(folder, tmp_path / "merged", silent) as merged:
        niwaki.compress(merged, plain, calibration=calibration, **WANDA)
    assert all(torch.equal(weights_of(out)[name], tensor) for name, tensor in weights_of(plain).items())
    niwaki.generate(out, "The", max_new_tokens=2, device="cpu")


def test_an_interrupted_run_resumes_on_the_same_merge(
    beside: tuple[Path, Tensor], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from niwaki.compression import job
    from niwaki.runtime import adapter

    arguments: dict[str, Any] = {
        "merge_adapter": True, "calibration": Calibration(files=(text,), samples=8, seq_len=32), **WANDA
    }  # fmt: skip

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(job, "_finish_walk", killed)
        with pytest.raises(KeyboardInterrupt):
            niwaki.compress(beside[0], tmp_path / "out", **arguments)
    assert (tmp_path / "out.merged").is_dir()
    with monkeypatch.context() as patched:
        patched.setattr(adapter, "_merge_to", killed)  # the merged model of the first attempt serves
        niwaki.compress(beside[0], tmp_path / "out", resume=True, **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_merge_that_loses_the_adapter_is_named_and_not_used(
    beside: tuple[Path, Tensor], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora.layer import Linear

    monkeypatch.setattr(Linear, "get_delta_weight", lambda layer, name: torch.zeros_like(layer.get_base_layer().weight))
    calibration = Calibration(files=(text,), samples=8, seq_len=32)
    with pytest.raises(NumericalError, match=r"the merged model\.layers\.0\.\S+ computes something else than base"):
        niwaki.compress(beside[0], tmp_path / "out", merge_adapter=True, calibration=calibration, **WANDA)
    assert not list(tmp_path.iterdir())


def test_plan_reads_the_base(beside: tuple[Path, Tensor], base: Path) -> None:
    found, wanted = (
        niwaki.plan(model, gpu="cpu", merge_adapter=merge, method="wanda", target="0.5")
        for model, merge in ((beside[0], True), (base, False))
    )
    assert found["output_bytes"] == wanted["output_bytes"]
    assert found["disk_bytes"] >= wanted["disk_bytes"] + found["model"]["bytes"]
    assert any("merging the adapter takes" in text for text in found["warnings"])


def test_adapters_that_do_not_fit_are_one_line(base: Path, tmp_path: Path) -> None:
    def problem(folder: Path, kind: type[Exception] = CheckpointError) -> str:
        with pytest.raises(kind) as refused:
            niwaki.compress(folder, tmp_path / "out", merge_adapter=True, **WANDA)
        assert not list(tmp_path.glob("out*")) and "\n" not in str(refused.value)
        return str(refused.value)

    assert "there is nothing to merge" in problem(base, InputError)
    trained(base, tmp_path / "a", target_modules=["q_proj"])
    weights = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "base_model.model.model.other.lora_A.weight": torch.ones(2)}, weights)
    assert "base_model.model.model.other.lora_A.weight has no place in" in problem(tmp_path / "a")
    name = sorted(tensors)[0]
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights)
    assert f"lacks {name}" in problem(tmp_path / "a")
    save_file({**tensors, name: torch.ones(3, 5)}, weights)
    assert "the adapter does not fit" in problem(tmp_path / "a")
    weights.rename(weights.with_suffix(".bin"))
    assert "a pickled one can run code and is never loaded" in problem(tmp_path / "a")
    (tmp_path / "a/adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/no/such"}')
    save_file(tensors, weights)
    assert "no model folder at /no/such" in problem(tmp_path / "a")
    (tmp_path / "a/adapter_config.json").write_text("[")
    assert "adapter_config.json cannot be read" in problem(tmp_path / "a")
