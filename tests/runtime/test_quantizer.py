"""Packed checkpoints: what the file holds, loading through transformers, and every reader of the same numbers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import niwaki
from niwaki.errors import CheckpointError
from niwaki.model.checkpoint import IMPORT_NIWAKI
from niwaki.model.config_file import WEIGHTS_FIELD
from niwaki.runtime.linear import PackedLinear
from support.families import build, families
from support.models import add_tokenizer, tiny_llama, write_texts

WIDTHS = {
    "rtn": ("4bit", {"group": 16}),
    "gptq": ("3bit", {"group": 0, "act_order": True}),
    "squeeze10": ("4bit", {"rounds": 1, "learn_rounds": 0}),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, dict[str, Path]]:
    """Make every method's result stored as codes (`auto`) and as weights (`none`)."""
    folder = tmp_path_factory.mktemp("packed")
    model = tiny_llama(folder / "model", dtype=torch.bfloat16, attention_bias=True)
    found: dict[str, dict[str, Path]] = {}
    for method, (target, options) in WIDTHS.items():
        found[method] = {}
        for pack in ("auto", "none"):
            out = found[method][pack] = folder / f"{method}-{pack}"
            niwaki.compress(
                model, out, method=method, target=target, options=options, pack=pack, device="cpu",
                calibration={"files": (str(text),), "samples": 4, "seq_len": 16},
            )  # fmt: skip
    return found


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "niwaki/blocks.jsonl").read_text().splitlines()]


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(out.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("method", WIDTHS)
def test_the_file_holds_what_the_lines_count_and_no_dense_matrix(method: str, results: dict) -> None:
    out = results[method]["auto"]
    tensors = tensors_of(out)
    for line in lines_of(out):
        module = f"model.layers.{line['block']}.{line['matrix']}"
        stored = {name: t for name, t in tensors.items() if name.startswith(module + ".") and not name.endswith("bias")}
        assert f"{module}.weight" not in stored
        assert sum(t.nbytes for t in stored.values()) == line["bytes"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert sorted(index["weight_map"]) == sorted(tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", WIDTHS)
def test_transformers_loads_codes_and_computes_the_same(method: str, dtype: torch.dtype, results: dict) -> None:
    packed = AutoModelForCausalLM.from_pretrained(results[method]["auto"], dtype=dtype)
    dense = AutoModelForCausalLM.from_pretrained(results[method]["none"], dtype=dtype)
    linears = [m for m in packed.model.layers.modules() if isinstance(m, PackedLinear)]
    assert len(linears) == 21 and not [
        n for n, _ in packed.model.layers.named_parameters() if n.endswith("proj.weight")
    ]
    ids = torch.randint(0, 4096, (2, 12), generator=torch.Generator().manual_seed(0))
    a, b = packed(ids).logits.float(), dense(ids).logits.float()
    # The dense copy was rounded to bf16 once more, and the kernel keeps its sums in float32.
    assert (a - b).norm() < 0.03 * b.norm()
    assert packed.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 16)


def test_casting_the_model_does_not_touch_the_scales(results: dict) -> None:
    model = AutoModelForCausalLM.from_pretrained(results["rtn"]["auto"], dtype=torch.float32)
    linear = model.model.layers[0].mlp.up_proj
    before = linear.weight_OI(torch.float32).clone()
    model.to(torch.bfloat16)
    assert torch.equal(linear.weight_OI(torch.float32), before)


@pytest.mark.parametrize("method", WIDTHS)
def test_evaluation_reads_codes_as_the_weights_they_stand_for(method: str, results: dict, text: Path) -> None:
    a, b = (
        niwaki.evaluate(results[method][pack], data=[str(text)], max_tokens=200, seq_len=32, device="cpu")
        for pack in ("auto", "none")
    )
    assert a["perplexity"] == b["perplexity"]


def test_save_pretrained_keeps_the_codes(results: dict, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(results["squeeze10"]["auto"])
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert json.loads((tmp_path / "again/config.json").read_text())[WEIGHTS_FIELD] == IMPORT_NIWAKI


@pytest.mark.parametrize("loader", ["AutoModelForCausalLM", "LlamaForCausalLM", "AutoModel"])
def test_without_niwaki_transformers_stops_and_says_what_to_do(loader: str, results: dict) -> None:
    script = f"import transformers; transformers.{loader}.from_pretrained({str(results['rtn']['auto'])!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and IMPORT_NIWAKI in done.stderr.splitlines()[-1]


def test_results_made_before_the_field_existed_still_load(results: dict, tmp_path: Path) -> None:
    shutil.copytree(results["rtn"]["auto"], tmp_path / "old")
    config = json.loads((tmp_path / "old/config.json").read_text())
    del config[WEIGHTS_FIELD]
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    ids = torch.arange(10)[None]
    new, old = (AutoModelForCausalLM.from_pretrained(path) for path in (results["rtn"]["auto"], tmp_path / "old"))
    assert torch.equal(new(ids).logits, old(ids).logits)


@pytest.mark.parametrize("first", ["niwaki", "transformers"])
def test_import_order_does_not_matter_and_importing_niwaki_loads_no_torch(first: str, results: dict) -> None:
    imports = ["import niwaki", "import sys; assert 'torch' not in sys.modules"]
    imports = imports if first == "niwaki" else ["import transformers.quantizers.auto", "import niwaki"]
    script = "\n".join([
        *imports,
        "from transformers import AutoModelForCausalLM",
        f"model = AutoModelForCausalLM.from_pretrained({str(results['rtn']['auto'])!r})",
        "print(type(model.model.layers[0].mlp.up_proj).__name__)",
    ])  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "PackedLinear", done.stderr[-2000:]


def test_a_packed_model_is_not_compressed_again(results: dict, tmp_path: Path) -> None:
    packed = results["rtn"]["auto"]
    with pytest.raises(CheckpointError, match="already quantized: start from the bf16"):
        niwaki.compress(packed, tmp_path / "out", method="rtn", target="4bit", device="cpu")
    assert not list(tmp_path.glob("out*"))


def test_a_shape_that_contradicts_the_model_is_named(results: dict, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in results["rtn"]["auto"].iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"]["shape"] = [7, 32]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj is 48×32 in the model and 7×32"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_what_cannot_be_packed_is_stored_dense_and_says_so(text: Path, tmp_path: Path) -> None:
    """Store fused experts, which have no module of their own, and the transposed matrices of GPT-2."""
    for family, packed in (("qwen3_moe", True), ("gpt2", False)):
        config = families()[family].config
        config.vocab_size = 4096
        build(config).save_pretrained(tmp_path / family)
        add_tokenizer(tmp_path / family)
        out = tmp_path / f"{family}-out"
        niwaki.compress(tmp_path / family, out, method="rtn", target="4bit", options={"group": 0}, device="cpu")
        lines = lines_of(out)
        dense = [line for line in lines if "stored" not in line]
        assert dense and all("not smaller" in line["note"] for line in dense)
        assert all(line["bits"] >= 16 for line in dense)
        assert any("stored" in line for line in lines) == packed
        assert AutoModelForCausalLM.from_pretrained(out)(torch.arange(8)[None]).logits.isfinite().all()
