"""Structured pruning end to end: what is stored is smaller, loads without niwaki, and computes what was measured."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import niwaki
from niwaki.cli.app import main
from niwaki.methods.method import MethodKind
from niwaki.methods.registry import method_names
from support.families import GQA, build, families
from support.models import add_tokenizer, file_bytes, tiny_llama, write_texts

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "opt")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("shaping") / "model")


def compress(model: Path, out: Path, text: Path, method: str = "comp", target: str = "0.3", **more: Any) -> Any:
    calibration = {"files": (str(text),), "samples": 8, "seq_len": 16}
    return niwaki.compress(model, out, method=method, target=target, calibration=calibration, device="cpu", **more)


def saved(family: str, folder: Path) -> Path:
    config = families()[family].config
    config.vocab_size = 4096  # of the tokenizer
    build(config).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def parameters(folder: Path) -> int:
    """Count those of all blocks, as plain transformers builds them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(20)[None] % 90
    model.generate(ids[:, :4], max_new_tokens=4, do_sample=False)
    torch.save(model(ids).logits.detach(), folder + ".pt")
assert "niwaki" not in sys.modules
"""


@pytest.fixture(scope="module")
def smaller(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int, Any]]:
    """Return result, parameters before and record of every family. Plain transformers, in one process of its own,
    has written the logits of each beside it."""
    folder = tmp_path_factory.mktemp("smaller")
    found = {}
    for family in FAMILIES:
        source = saved(family, folder / f"{family}-dense")
        record = compress(source, folder / family, text, options={"multiple": 4})
        found[family] = folder / family, parameters(source), record
    subprocess.run([sys.executable, "-c", PLAIN, *(str(out) for out, *_ in found.values())], check=True)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_loads_what_is_left_and_computes_the_same(family: str, smaller: dict[str, Any]) -> None:
    out, before, record = smaller[family]
    found = record["allocation"]
    assert found["cut"] and found["removed_frac"] >= 0.3 and len(found["trials"]) > 1
    assert parameters(out) == round(before * (1 - found["removed_frac"]))
    assert found["shape"] == {k: v for k, v in min(found["trials"], key=lambda t: t["loss"]).items() if k != "loss"}
    logits = torch.load(f"{out}.pt", weights_only=True)
    ours = niwaki.load(out, device="cpu").float()(torch.arange(20)[None] % 90).logits
    torch.testing.assert_close(logits, ours, rtol=1e-3, atol=1e-3)


def test_the_smaller_model_equals_the_full_one_with_zeros(model: Path, text: Path, tmp_path: Path) -> None:
    compress(model, tmp_path / "out", text, method="wanda_sp")
    lines = [json.loads(line) for line in (tmp_path / "out/niwaki/blocks.jsonl").read_text().splitlines()]
    kept = {(line["block"], line["matrix"]): line["kept_groups"] for line in lines if "kept_groups" in line}
    masked = niwaki.load(model, device="cpu").float()
    with torch.no_grad():
        for (index, name), groups in kept.items():
            weight = masked.get_submodule(f"model.layers.{index}.{name}").weight
            total = 2 if "o_proj" in name else weight.shape[1]
            alive = torch.zeros(total, dtype=torch.bool)
            alive[groups] = True
            weight *= alive.repeat_interleave(weight.shape[1] // total)
    ids = torch.arange(20)[None] % 90
    found = niwaki.load(tmp_path / "out", device="cpu").float()(ids).logits
    torch.testing.assert_close(found, masked(ids).logits, rtol=1e-4, atol=1e-4)


def test_blocks_that_go_leave_no_file_and_others_keep_their_bytes(model: Path, text: Path, tmp_path: Path) -> None:
    record = compress(model, tmp_path / "out", text, method="shortgpt", target="0.33")
    (gone,) = record["allocation"]["shape"]["dropped"]
    influence = record["allocation"]["influence"]
    assert influence[gone] == min(influence)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3  # two blocks and the ends
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(f) for f in (model, tmp_path / "out"))
    left = [layer for index, layer in enumerate(before.model.layers) if index != gone]
    for old, new in zip(left, after.model.layers, strict=True):
        for (name, a), b in zip(old.named_parameters(), new.parameters(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("method", method_names(MethodKind.SHAPE))
def test_same_seed_same_bytes(method: str, model: Path, text: Path, tmp_path: Path) -> None:
    source = file_bytes(model)
    for name in ("a", "b"):
        compress(model, tmp_path / name, text, method=method, seed=3)
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b") and file_bytes(model) == source


RESUMED: list[dict[str, Any]] = [
    {"options": {"try_blocks": 0}},
    {"options": {"try_blocks": 2, "try_heads": 0}, "target": "0.6"},
    {"options": {"try_blocks": 0, "learn_rounds": 2, "target": "both"}, "allocation": "searched"},
    {"options": {"try_blocks": 0, "supervise": "outputs"}, "allocation": "damage"},
    {"method": "flap"},
    {"method": "flap", "pack": "none"},
]


@pytest.mark.parametrize("recipe", RESUMED, ids=str)
def test_a_resume_ends_with_the_same_bytes(
    recipe: dict[str, Any], model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(model, tmp_path / "whole", text, **recipe)
    from niwaki.compression import walk

    real, blocks = walk._compress_block, iter(range(100))

    def stopping(block: Any, plan: Any, *rest: Any) -> Any:
        # the third block of the walk itself, not of a trial: only that runs with all windows
        if len(rest[0]) == 8 and next(blocks) == 2:
            raise OSError("stop")
        return real(block, plan, *rest)

    monkeypatch.setattr(walk, "_compress_block", stopping)
    with pytest.raises(OSError, match="stop"):
        compress(model, tmp_path / "out", text, **recipe)
    monkeypatch.setattr(walk, "_compress_block", real)
    assert any((tmp_path / "out.partial/niwaki/journal").glob("block-0000*.json"))
    compress(model, tmp_path / "out", text, resume=True, **recipe)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "whole")


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_searched_widths_are_stored_as_found(family: str, text: Path, tmp_path: Path) -> None:
    source = saved(family, tmp_path / "model")
    before = parameters(source)
    options = {"multiple": 4, "try_blocks": 0, "try_heads": 0}
    record = compress(source, tmp_path / "out", text, allocation="searched", options=options)
    found = record["allocation"]
    even, *tried = found["trials"]
    losses = {(str(t["neurons"]), str(t["heads"])): t["loss"] for t in [*tried, even]}
    shape = found["shape"]
    assert losses[str(shape["neurons"]), str(shape["heads"])] <= even["loss"] and len(tried) > 6
    assert found["cut"] and found["removed_frac"] >= 0.3
    assert parameters(tmp_path / "out") == round(before * (1 - found["removed_frac"]))


def test_widths_of_their_own_compute_what_zeros_in_place_do(model: Path, text: Path, tmp_path: Path) -> None:
    for pack in ("auto", "none"):
        record = compress(model, tmp_path / pack, text, method="flap", pack=pack)
        assert record["allocation"]["cut"] == (pack == "auto")
    neurons = record["allocation"]["shape"]["neurons"]
    assert len(set(neurons)) > 1
    ids = torch.arange(20)[None] % 90
    cut, full = (niwaki.load(tmp_path / pack, device="cpu") for pack in ("auto", "none"))
    assert [layer.mlp.down_proj.in_features for layer in cut.model.layers] == neurons
    torch.testing.assert_close(cut(ids).logits, full(ids).logits, rtol=1e-4, atol=1e-4)
    cut.save_pretrained(tmp_path / "again")
    again = niwaki.load(tmp_path / "again", device="cpu")
    assert torch.equal(again(ids).logits, cut(ids).logits)
    text_out = niwaki.generate(tmp_path / "auto", "a b", max_new_tokens=4, device="cpu")
    assert text_out == niwaki.generate(tmp_path / "none", "a b", max_new_tokens=4, device="cpu")


CHAINS = [
    ("gptq", "4bit", {"gptq.group": 8}),
    ("wandapp", "2:4", {"wandapp.rounds": 2, "wandapp.samples": 4}),
    ("squeeze10", "1.75bit", {"squeeze10.rounds": 1, "squeeze10.learn_rounds": 1, "squeeze10.samples": 4}),
    ("rtn", "8bit", {}),
]


@pytest.mark.parametrize(("then", "target", "options"), CHAINS, ids=[name for name, *_ in CHAINS])
def test_a_chain_equals_its_stages_one_after_another(
    then: str, target: str, options: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    model = tiny_llama(tmp_path / "model", intermediate_size=384, hidden_size=128)
    options = {"comp.try_heads": 0, **options}
    record = compress(model, tmp_path / "out", text, method=f"comp+{then}", target=f"0.3+{target}", options=options)
    assert not (tmp_path / "out.shaped").exists()
    (first,) = record["stages"]
    assert record["model"]["source"] == str(model) and set(record["options"]) == {"comp", then}
    neurons = first["allocation"]["shape"]["neurons"]
    assert neurons % (8 if "gptq.group" in options else 128 if then == "rtn" else 4) == 0
    compress(model, tmp_path / "one", text, options={"try_heads": 0, "multiple": neurons})
    own = {key.removeprefix(f"{then}."): value for key, value in options.items() if key.startswith(then)}
    compress(tmp_path / "one", tmp_path / "two", text, method=then, target=target, options=own)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "two")
    assert f"comp+{then} 0.3+{target}" in (tmp_path / "out/README.md").read_text()


def test_a_chain_that_was_stopped_goes_on(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: dict[str, Any] = {"method": "comp+wanda", "target": "0.3+0.5"}
    compress(model, tmp_path / "whole", text, **recipe)
    from niwaki.compression import walk

    real = walk._compress_block

    def stopping(block: Any, plan: Any, *rest: Any) -> Any:
        if plan.steps[0].name == "wanda" and block.index == 1:
            raise OSError("stop")
        return real(block, plan, *rest)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="stop"):
        patched.setattr(walk, "_compress_block", stopping)
        compress(model, tmp_path / "out", text, **recipe)
    assert (tmp_path / "out.shaped/config.json").exists() and not (tmp_path / "out").exists()
    compress(model, tmp_path / "out", text, resume=True, **recipe)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "whole")


def test_a_second_method_starts_from_the_result(model: Path, text: Path, tmp_path: Path) -> None:
    compress(model, tmp_path / "small", text)
    record = compress(tmp_path / "small", tmp_path / "both", text, method="wanda", target="0.5")
    assert record["result"]["zeros_frac"] == 0.5
    assert parameters(tmp_path / "both") == parameters(tmp_path / "small")


WRONG = [
    (["--target", "0.99"], "target 0.99: comp finds no shape that removes this share"),
    (["--target", "2:4"], "comp"),
    (["--allocation", "owl"], "comp chooses the shape itself: drop allocation owl"),
    (["--method", "comp+wanda"], "expected a target for comp and one for wanda, such as 0.25+4bit, got 0.3"),
    (["--method", "wanda+comp"], "comp changes the shape of the model: put it first in the chain"),
    (["--method", "comp+gptq", "--target", "0.3+2:4"], "method gptq meets bits such as 4bit, got target 2:4"),
    (["--method", "comp+rtn", "--target", "0.3+4bit", "--set", "rtn.grup=64"], "grup"),
    (["--set", "learn_rounds=-1"], "learn_rounds ≥ 0"),
    (["--method", "wanda", "--allocation", "searched"], "searched widths need a structured method"),
    (["--set", "score=best"], "score must be one of surgeon, gram_condition, weight_condition, pca"),
    (["--set", "at_once=-1"], "at_once ≥ 0"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_requests_are_one_line_and_leave_nothing(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    sys.argv = [
        "niwaki", "compress", str(model), str(tmp_path / "out"), "--method", "comp", "--target", "0.3",
        "--calibration", str(text), "--samples", "4", "--seq-len", "8", "--device", "cpu", *arguments,
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert message in " ".join(errors.split()) and "Traceback" not in errors
    assert not list(tmp_path.glob("out*"))


def test_fused_matrices_are_refused(text: Path, tmp_path: Path) -> None:
    source = saved("gpt_neox", tmp_path / "model")
    with pytest.raises(niwaki.ArchitectureError, match="q, k and v apart"):
        compress(source, tmp_path / "out", text)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("options", [
    {"tune": "scales"}, {"tune": "none"}, {"score": "energy"}, {"score": "leverage"}, {"score": "random"},
    {"supervise": "outputs"}, {"supervise": "outputs", "supervise_frac": 0.5, "score": "energy", "tune": "scales"},
])  # fmt: skip
def test_every_option_leaves_the_same_number_of_parameters(options: dict[str, Any], text: Path, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**GQA, "num_hidden_layers": 2, "vocab_size": 4096})
    build(config).save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    options = options | {"try_blocks": 0, "try_heads": 0, "multiple": 4}
    record = compress(tmp_path / "model", tmp_path / "out", text, options=options)
    assert record["allocation"]["shape"] == {"neurons": 20, "heads": 2, "dropped": []}
    assert record["result"]["weights"] == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 20 * 32)
