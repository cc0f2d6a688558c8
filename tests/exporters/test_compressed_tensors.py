"""Exports to compressed-tensors: what transformers then loads is what niwaki loads, and what cannot be is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import niwaki
from niwaki.cli.app import main
from niwaki.errors import CheckpointError, InputError, OutputError
from support.families import build, families
from support.models import add_tokenizer, file_bytes, tiny_llama, weights_of, write_texts

TO = "compressed-tensors"
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "symmetric group": ("rtn", "4bit", {"group": 16, "symmetric": True}),
    "affine group": ("rtn", "4bit", {"group": 16}),
    "affine group gptq": ("gptq", "4bit", {"group": 16, "act_order": True}),
    "symmetric channel": ("rtn", "4bit", {"group": 0, "symmetric": True}),
    "affine channel": ("rtn", "4bit", {"group": 0}),
    "affine group 8 bits": ("rtn", "8bit", {"group": 16}),
    "symmetric channel 8 bits": ("gptq", "8bit", {"group": 0, "symmetric": True}),
}
REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "mixed": ("squeeze10", "4bit", {"widths": "1+4"}, "is stored as 4-bit midrise and 1-bit free codes: "),
    "3 bits": ("rtn", "3bit", {"group": 16}, "is stored as 3-bit affine codes"),
    "unpacked": ("rtn", "4bit", {"group": 16, "pack": "none"}, "holds no codes, so there is nothing to export"),
    "pruned": ("magnitude", "0.5", {}, "is stored as nonzeros, which compressed-tensors has no format for"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths that are no multiple of 32, so that rows and words are padded; biases; an untied head."""
    folder = tmp_path_factory.mktemp("export")
    return tiny_llama(
        folder / "model", blocks=2, hidden_size=48, intermediate_size=80, attention_bias=True, tie_word_embeddings=False
    )


def compress(model: Path, out: Path, method: str, target: str, options: dict[str, Any]) -> Path:
    options = dict(options)
    pack = options.pop("pack", "auto")
    text = write_texts(out.with_suffix(".jsonl"))
    niwaki.compress(
        model, out, method=method, target=target, options=options, pack=pack, device="cpu",
        calibration={"files": (str(text),), "samples": 4, "seq_len": 16},
    )  # fmt: skip
    return out


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for shard in sorted(folder.glob("*.safetensors")) for name, t in load_file(shard).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_the_same_weights_and_logits(kind: str, model: Path, tmp_path: Path) -> None:
    out = compress(model, tmp_path / "out", *KINDS[kind])
    record = niwaki.export(out, tmp_path / "dest", to=TO)
    ids_BT = torch.randint(0, 4096, (2, 12), generator=torch.Generator().manual_seed(0))
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dest", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        a_BTV, b_BTV = ours(ids_BT).logits, theirs(ids_BT).logits  # the first forward unpacks the codes
    assert (a_BTV - b_BTV).norm() < 2e-3 * a_BTV.norm()  # our kernel rounds its tables
    for name, weight in weights_of(out).items():
        rtol = 2**-11 if "affine" in kind else 0  # decoded in the dtype of the scales, float16
        torch.testing.assert_close(theirs.get_parameter(name).detach(), weight, rtol=rtol, atol=0)
    line = json.loads((tmp_path / "dest/niwaki/blocks.jsonl").read_text().splitlines()[0])
    assert line["stored"]["parts"][0]["bits"] == int(KINDS[kind][1][0])
    assert record["export"]["bits"] > line["stored"]["parts"][0]["bits"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_file_holds_exact_scales_and_half_precision_loads(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", blocks=2, dtype=dtype)
    out = compress(model, tmp_path / "out", "rtn", "4bit", {"group": 16})
    niwaki.export(out, tmp_path / "dest", to=TO)
    before, after = tensors_of(out), tensors_of(tmp_path / "dest")
    name = "model.layers.0.mlp.up_proj."
    assert torch.equal(after[name + "weight_scale"], before[name + "scale_0"].view(torch.float16).T)
    ids_BT = torch.arange(1, 13)[None]
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(ids_BT).logits.float()
        for folder in (out, tmp_path / "dest")
    )
    assert (ours - theirs).norm() < (0.03 if dtype is torch.bfloat16 else 4e-3) * ours.norm()


def test_the_folder_is_complete_and_says_what_it_is(model: Path, tmp_path: Path) -> None:
    out = compress(model, tmp_path / "out", *KINDS["affine group"])
    before = file_bytes(out)
    record = niwaki.export(out, tmp_path / "dest", to=TO)
    assert file_bytes(out) == before
    dest = tmp_path / "dest"
    assert record == json.loads((dest / "niwaki/run.json").read_text())
    assert record["recipe"]["method"] == "rtn" and record["export"]["to"] == TO
    assert record["export"]["format"] == "pack-quantized"
    tensors = tensors_of(dest)
    index = json.loads((dest / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    config = json.loads((dest / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == TO and config["format"] == "pack-quantized" and config["ignore"] == ["lm_head"]
    assert "sparsity_config" not in config
    card = (dest / "README.md").read_text()
    assert "pip install compressed-tensors" in card and "import niwaki" not in card and str(tmp_path) not in card
    assert "niwaki export OUT DEST --to compressed-tensors" in card and f"{record['export']['bytes']:,}" in card
    assert (dest / "tokenizer.json").is_file() and not list(tmp_path.glob("dest.*"))
    with pytest.raises(CheckpointError, match="already quantized"):
        niwaki.export(dest, tmp_path / "again", to=TO)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_format_cannot_hold_is_one_line_and_exit_code_2(
    kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, target, options, message = REFUSED[kind]
    out = compress(model, tmp_path / "out", method, target, options)
    sys.argv = ["niwaki", "export", str(out), str(tmp_path / "dest"), "--to", TO]
    with pytest.raises(SystemExit) as stopped:
        main()
    errors = capsys.readouterr().err
    assert stopped.value.code == 2
    assert errors.startswith("error: ") and len(errors.strip().splitlines()) == 1 and message in errors
    assert not list(tmp_path.glob("dest*"))


def test_an_export_from_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = compress(model, tmp_path / "out", *KINDS["symmetric group"])
    capsys.readouterr()
    sys.argv = ["niwaki", "export", str(out), str(tmp_path / "dest"), "--to", TO]
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert not stopped.value.code and "pack-quantized, 5." in printed.out
    assert printed.err.splitlines()[0].startswith("exporting: part 1/")


def test_wrong_requests(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = compress(model, tmp_path / "out", *KINDS["symmetric group"])
    with pytest.raises(InputError, match="unknown export format 'compressed-tensor': did you mean"):
        niwaki.export(out, tmp_path / "dest", to="compressed-tensor")
    with pytest.raises(CheckpointError, match=r"no niwaki/run\.json: expected a folder"):
        niwaki.export(model, tmp_path / "dest", to=TO)
    with pytest.raises(InputError, match="takes the codes as they are: leave --type out"):
        niwaki.export(out, tmp_path / "dest", to=TO, type="f16")
    with pytest.raises(OutputError, match="does not exist: create it"):
        niwaki.export(out, tmp_path / "no/dest", to=TO)
    with pytest.raises(OutputError, match=r"not a niwaki result|share a folder"):
        niwaki.export(out, out / "inside", to=TO, overwrite=True)
    assert not list(tmp_path.glob("dest*"))
    niwaki.export(out, tmp_path / "dest", to=TO)
    before = file_bytes(tmp_path / "dest")
    with pytest.raises(OutputError, match="already exists"):
        niwaki.export(out, tmp_path / "dest", to=TO)
    niwaki.export(out, tmp_path / "dest", to=TO, overwrite=True)
    assert file_bytes(tmp_path / "dest") == before
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(InputError, match=r"needs the package compressed-tensors: pip install compressed-tensors"):
        niwaki.export(out, tmp_path / "other", to=TO)


def test_a_failure_in_the_middle_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from niwaki.exporters import compressed_tensors

    out = compress(model, tmp_path / "out", *KINDS["symmetric group"])
    save, calls = compressed_tensors.write_shard, []

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> str:
        calls.append(path)
        if len(calls) == 2:
            raise OutputError("no space")
        return save(path, tensors)

    monkeypatch.setattr(compressed_tensors, "write_shard", full)
    with pytest.raises(OutputError, match="no space"):
        niwaki.export(out, tmp_path / "dest", to=TO)
    assert not list(tmp_path.glob("dest*"))


def test_fused_experts_stored_dense_are_refused(tmp_path: Path) -> None:
    config = families()["qwen3_moe"].config
    config.vocab_size = 4096
    build(config).save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    out = tmp_path / "out"
    niwaki.compress(tmp_path / "model", out, method="rtn", target="4bit", options={"group": 0}, device="cpu")
    with pytest.raises(InputError, match=r"stores 16 of its 31 matrices dense .*results that are all codes"):
        niwaki.export(out, tmp_path / "dest", to=TO)
    assert not list(tmp_path.glob("dest*"))
