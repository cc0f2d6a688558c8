"""SparseLinear, and pruned checkpoints that are stored packed: files, loading, and every reader of the same numbers."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import niwaki
from niwaki.errors import CheckpointError, InputError
from niwaki.formats.sparse import Sparse
from niwaki.formats.sparse_tiles import Tiled
from niwaki.model.checkpoint import Checkpoint
from niwaki.runtime import chunked_matmul
from niwaki.runtime.sparse_linear import SparseLinear
from support.families import build, families
from support.models import add_tokenizer, tiny_llama, write_texts
from support.sparse_records import coded, pruned

RESULTS = {"half": ("magnitude", "0.5"), "two-four": ("sparsegpt", "2:4"), "most": ("wanda", "0.8")}


def layer(record: Sparse | Tiled, bias: bool) -> SparseLinear:
    about = record.describe()
    found = SparseLinear(*about["shape"], about, bias)
    found.load_state_dict({**record.tensors(), **({"bias": torch.randn(about["shape"][0])} if bias else {})})
    return found


def records() -> dict[str, Sparse | Tiled]:
    found: dict[str, Sparse | Tiled] = {
        name: Sparse.encode(pruned(100, 256, name).bfloat16(), layout=name) for name in ("bitmap", "two_four")
    }
    for name in ("bitmap", "two_four"):
        codes = Sparse.encode_codes(coded(100, 256, 4, 64, name)[0], layout=name)
        assert codes is not None
        found[f"{name} int4"] = codes
        if name == "two_four":
            tiled = Tiled.encode(codes)
            assert tiled is not None
            found["tiles"] = tiled
    return found


@pytest.mark.parametrize("kind", ["bitmap", "two_four", "bitmap int4", "two_four int4", "tiles"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 70, 300])  # kernels, in chunks, and decoded rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_the_linear_layer_of_the_decoded_matrix(
    tokens: int, bias: bool, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_matmul, "CHUNK_BYTES", 1)
    record = records()[kind]
    found = layer(record, bias).to(dtype)
    assert torch.equal(found.weight_OI(torch.float32), record.decode())
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = torch.nn.functional.linear(
        x.float(), record.decode(), None if found.bias is None else found.bias.float()
    )
    y = found(x.view(1, tokens, 256))
    assert y.dtype == dtype and y.shape == (1, tokens, 100)
    limit = (3e-4 if kind == "tiles" else 1e-5) if dtype == torch.float32 else 1e-2
    assert float((y[0].float() - expected).norm() / expected.norm()) < limit


def test_kernels_follow_copies_and_what_is_loaded() -> None:
    first, second = records()["bitmap"], Sparse.encode(pruned(100, 256, "bitmap", seed=9).bfloat16(), layout="bitmap")
    found, x = layer(first, False), torch.eye(256)[:3]
    assert torch.equal(found(x), first.decode().T[:3])
    again = copy.deepcopy(found)
    assert torch.equal(again(x), found(x)) and again._prepare() is not found._prepare()
    fresh = SparseLinear(100, 256, second.describe(), False)
    fresh.load_state_dict(second.tensors(), assign=True)
    assert torch.equal(fresh(x), second.decode().T[:3])
    wanted = -second.decode().T[:3]
    other = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    other["values"] = -other["values"].view(torch.bfloat16)
    fresh.load_state_dict({**other, "values": other["values"].view(torch.uint8)})
    assert torch.equal(fresh(x), wanted)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, dict[str, Path]]:
    """Every result packed (`auto`) and with its zeros in place (`codes`, what is done by default, and `none`)."""
    folder = tmp_path_factory.mktemp("sparse")
    model = tiny_llama(folder / "model", dtype=torch.bfloat16, attention_bias=True)
    found: dict[str, dict[str, Path]] = {}
    for name, (method, target) in RESULTS.items():
        found[name] = {}
        for pack in ("auto", "codes"):
            out = found[name][pack] = folder / f"{name}-{pack}"
            niwaki.compress(
                model, out, method=method, target=target, pack=pack, device="cpu",
                calibration={"files": (str(text),), "samples": 4, "seq_len": 16},
            )  # fmt: skip
    return found


def test_a_model_is_loaded_with_fast_prompts_where_asked(results: dict[str, dict[str, Path]]) -> None:
    for asked in (False, True):
        model = niwaki.load(results["two-four"]["auto"], device="cpu", fast_prompts=asked)
        assert {part.fast_prompts for part in model.modules() if isinstance(part, SparseLinear)} == {asked}


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "niwaki/blocks.jsonl").read_text().splitlines()]


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(out.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("name", RESULTS)
def test_the_file_holds_what_the_lines_count_and_no_dense_matrix(name: str, results: dict) -> None:
    out = results[name]["auto"]
    tensors, lines = tensors_of(out), lines_of(out)
    layouts = {"half": "bitmap", "two-four": "two_four", "most": "bitmap"}
    for line in lines:
        owner = f"model.layers.{line['block']}.{line['matrix']}"
        stored = {key: t for key, t in tensors.items() if key.startswith(owner + ".") and not key.endswith("bias")}
        assert f"{owner}.weight" not in stored and line["note"] == ""
        assert line["stored"]["sparse"]["layout"] == layouts[name]
        assert sum(t.nbytes for t in stored.values()) == line["bytes"]
    plain = lines_of(results[name]["codes"])
    assert all("stored" not in line for line in plain)
    assert sum(line["bytes"] for line in lines) < 0.75 * sum(line["bytes"] for line in plain)
    result = json.loads((out / "niwaki/run.json").read_text())["result"]
    assert result["sparse"] == {layouts[name]: result["matrices"]} and result["packed"] == result["matrices"]
    assert "stored as the weights that are left" in (out / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", RESULTS)
def test_transformers_loads_nonzeros_generates_and_saves_them(
    name: str, dtype: torch.dtype, results: dict, tmp_path: Path
) -> None:
    packed = AutoModelForCausalLM.from_pretrained(results[name]["auto"], dtype=dtype)
    dense = AutoModelForCausalLM.from_pretrained(results[name]["codes"], dtype=dtype)
    kinds = {type(packed.get_submodule(f"model.layers.{line['block']}.{line['matrix']}")) for line in lines_of(
        results[name]["auto"])}  # fmt: skip
    assert kinds == {SparseLinear}
    for ids in (torch.arange(3)[None], torch.arange(320).view(8, 40)):  # kernels, and decoded rows (float32)
        limit = 1e-5 if dtype == torch.float32 else 0.05
        found, wanted = (each(ids).logits.detach().float() for each in (packed, dense))
        assert float((found - wanted).norm() / wanted.norm()) < limit
    ids = torch.arange(10)[None]
    generated = packed.generate(ids, max_new_tokens=8, do_sample=False)
    assert generated.shape == (1, 18)
    if dtype == torch.float32:
        assert torch.equal(generated, dense.generate(ids, max_new_tokens=8, do_sample=False))
    packed.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(packed(ids).logits, again(ids).logits)


@pytest.mark.parametrize("name", RESULTS)
def test_evaluation_reads_nonzeros_as_the_weights_they_stand_for(name: str, results: dict, text: Path) -> None:
    a, b = (
        niwaki.evaluate(results[name][pack], data=[str(text)], max_tokens=200, seq_len=32, device="cpu")
        for pack in ("auto", "codes")
    )
    assert a["perplexity"] == b["perplexity"]


def test_readers_of_the_checkpoint_see_plain_weights(results: dict) -> None:
    packed, plain = (Checkpoint.open(results["half"][pack]) for pack in ("auto", "codes"))
    found, wanted = packed.read(packed.tensors), plain.read(plain.tensors)
    assert sorted(found) == sorted(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_resumed_run_ends_at_the_same_bytes(results: dict, text: Path, tmp_path: Path) -> None:
    def stop(event: str, **fields: Any) -> None:
        if event == "saved" and fields["part"] == "block-00000":
            raise KeyboardInterrupt

    def work(**more: Any) -> None:
        niwaki.compress(
            results["half"]["auto"].parent / "model", tmp_path / "out", method="sparsegpt", target="2:4",
            pack="auto", device="cpu", calibration={"files": (str(text),), "samples": 4, "seq_len": 16}, **more,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        work(report=stop)
    work(resume=True)
    found, wanted = tensors_of(tmp_path / "out"), tensors_of(results["two-four"]["auto"])
    assert sorted(found) == sorted(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("group", "layouts"), [(16, {"two_four"}), (0, {"two_four", "two_four_tiles"})])
def test_pruned_then_rounded_weights_are_stored_once_with_their_zeros_left_out(
    group: int, layouts: set[str], results: dict, tmp_path: Path
) -> None:
    """Rounding to nearest on a symmetric grid keeps zeros: codes of what is left are smaller than codes of all."""
    made = {}
    for pack in ("auto", "codes"):
        made[pack] = tmp_path / pack
        niwaki.compress(
            results["two-four"]["codes"], made[pack], method="rtn", target="4bit", pack=pack, device="cpu",
            options={"group": group, "symmetric": True},
        )  # fmt: skip
    lines = lines_of(made["auto"])
    assert {line["stored"]["sparse"]["values"] for line in lines} == {"int4"}
    assert {line["stored"]["sparse"]["layout"] for line in lines} == layouts
    assert sum(line["bytes"] for line in lines) < sum(line["bytes"] for line in lines_of(made["codes"]))
    a, b = (AutoModelForCausalLM.from_pretrained(made[pack], dtype=torch.float32) for pack in ("auto", "codes"))
    assert torch.equal(
        a.model.layers[0].mlp.up_proj.weight_OI(torch.float32), b.model.layers[0].mlp.up_proj.weight_OI(torch.float32)
    )
    found, wanted = (each(torch.arange(3)[None]).logits.detach() for each in (a, b))
    assert float((found - wanted).norm() / wanted.norm()) < 5e-3  # of both kernels


def test_too_few_zeros_and_matrices_without_a_packed_form_stay_and_say_so(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "few"
    niwaki.compress(tiny_llama(tmp_path / "model"), out, method="magnitude", target="0.02", pack="auto", device="cpu")
    assert all("too few" in line["note"] and "stored" not in line for line in lines_of(out))
    config = families()["gpt2"].config
    config.vocab_size = 4096
    build(config).save_pretrained(tmp_path / "gpt2")
    add_tokenizer(tmp_path / "gpt2")
    out = tmp_path / "gpt2-out"
    niwaki.compress(tmp_path / "gpt2", out, method="magnitude", target="0.5", pack="auto", device="cpu")
    assert all("no packed form" in line["note"] and "stored" not in line for line in lines_of(out))


def test_what_cannot_take_nonzeros_says_what_to_do(results: dict, tmp_path: Path) -> None:
    packed = results["half"]["auto"]
    with pytest.raises(CheckpointError, match=re.escape("is already packed: use --pack none")):
        niwaki.compress(packed, tmp_path / "out", method="rtn", target="4bit", device="cpu")
    with pytest.raises(InputError, match="stored as nonzeros"):
        niwaki.export(packed, tmp_path / "out", to="compressed-tensors")
    assert not list(tmp_path.glob("out*"))
