"""Whole benchmarks of tiny models, by the command and in Python: what is in the record, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import niwaki
from niwaki.measure.bench import session, timing
from niwaki.measure.bench.models import config_only_folder, random_model, read_config
from niwaki.measure.bench.prefill_decode import TimedWork, decode_work, has_window
from niwaki.measure.bench.schema import Bench, read_bench
from niwaki.measure.bench.variants import VARIANTS
from niwaki.runtime.sparse_linear import SparseLinear
from support.models import run

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
FAST = {"context": 17, "new_tokens": 2, "prompt_tokens": 20, "rounds": 2, "device": "cpu", "threads": 1}
FAST_FLAGS = ["--context", 17, "--new", 2, "--prompt", 20, "--rounds", 2, "--device", "cpu", "--threads", 1]


@pytest.fixture(autouse=True)
def small_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "CPU_BYTES", 2**20)


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a config and no weights."""
    folder = tmp_path_factory.mktemp("bench") / "shape"
    folder.mkdir()
    config = transformers.LlamaConfig(**SIZES, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    return folder


@pytest.fixture(scope="module")
def whole(shape: Path) -> Bench:
    """Measure all variants."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "CPU_BYTES", 2**20)
        return niwaki.bench(shape, batches=(1, 4), **FAST)


def test_every_variant_has_a_row_after_the_dense_one(whole: Bench) -> None:
    assert [row.variant for row in whole.rows] == ["dense", *VARIANTS]
    assert whole.random_weights and whole.blocks == 2 and whole.settings.steps == "one call after another"
    assert "not measured" in whole.quality
    for row in whole.rows:
        assert not row.reason and row.prefill is not None, row.reason
        assert [(each.sequences, each.tokens) for each in row.decode] == [(1, 2), (4, 8)]
        assert (row.prefill.tokens, row.prefill.read_bytes) == (20, None)
        assert row.bandwidth_bytes_per_s is not None and row.bandwidth_bytes_per_s > 0
        assert row.weight_bytes is not None and (row.peak_bytes is None or row.peak_bytes >= row.weight_bytes)
        if row.variant != "dense":
            assert all(len(each.tokens_per_s) == len(each.dense_tokens_per_s) == 2 for each in row.cells)
    assert all(len(each.tokens_per_s) == 2 * len(VARIANTS) for each in whole.rows[0].cells)


def test_fewer_bits_are_fewer_bytes_and_what_is_read_follows(whole: Bench) -> None:
    rows = {row.variant: row for row in whole.rows}
    read = {name: row.decode[0].read_bytes or 0 for name, row in rows.items()}
    assert read["1.6bit"] < read["2:4+4bit"] < read["4bit"] < read["2:4"] < read["bitmap"] < read["dense"]
    # the skipped half of the matrices of two blocks, 40,960 weights each of 2 bytes
    assert abs(read["dense"] - read["contextual"] - 40960 * 2) < 0.05 * 40960 * 2
    assert abs(read["dense"] - read["inputs"] - 40960 * 2) < 0.1 * 40960 * 2


def test_what_multiplied_is_in_every_cell(whole: Bench) -> None:
    kernels = {row.variant: [each.kernel for each in row.cells] for row in whole.rows}
    assert kernels["dense"] == kernels["structured"] == ["torch"] * 3
    assert kernels["4bit"][2] == "decoded, then torch" != kernels["4bit"][0]
    assert {row.variant: row.decode[0].note for row in whole.rows}["contextual"].startswith("skips 5")
    assert kernels["contextual"][0] == "torch on copies" and kernels["contextual"][2] == "torch"
    assert {row.variant: row.decode[0].note for row in whole.rows}["inputs"].startswith("skips 5")
    assert kernels["inputs"][0] in ("torch", "portable", "AVX2", "AVX-512") and kernels["inputs"][2] == "torch"


def test_sides_take_turns(shape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real = session.decode_work

    def spied(model: Any, *args: Any, **kwargs: Any) -> Any:
        work = real(model, *args, **kwargs)
        name = "variant" if any(isinstance(part, SparseLinear) for part in model.modules()) else "dense"
        return TimedWork(lambda: (order.append(name), work.run())[1], work.warm_up)

    monkeypatch.setattr(session, "decode_work", spied)
    niwaki.bench(shape, variants=["bitmap"], batches=(1,), **{**FAST, "prompt_tokens": 0, "rounds": 3})
    assert order == ["dense", "variant"] * 3


def test_the_command_prints_writes_and_draws(shape: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "bench.json", tmp_path / "bench.svg"
    code, printed, _ = run(
        capsys, "bench", shape, "--variants", "2:4", "--batch", "1", *FAST_FLAGS, "--json", files[0], "--plot", files[1]
    )
    assert code == 0
    assert "random" in printed and "2:4 (2:4, indices)" in printed and "quality not measured" in printed
    found = read_bench(files[0])
    assert [row.variant for row in found.rows] == ["dense", "2:4"]
    assert "<svg" in files[1].read_text() and sorted(tmp_path.iterdir()) == sorted(files)


def test_results_are_measured_as_they_are(shape: Path, tmp_path: Path) -> None:
    model = random_model(read_config(shape), torch.bfloat16, torch.device("cpu"))
    dense, out = tmp_path / "dense", tmp_path / "out"
    model.save_pretrained(dense)
    niwaki.compress(dense, out, method="magnitude", target="0.5", pack="auto", device="cpu")
    found = niwaki.bench(dense, out, batches=(1,), **{**FAST, "prompt_tokens": 0})
    assert not found.random_weights
    assert [(row.variant, row.about, row.source) for row in found.rows[1:]] == [("out", "magnitude 0.5", str(out))]
    assert (found.rows[1].weight_bytes or 0) < (found.rows[0].weight_bytes or 0)


def test_a_form_that_cannot_be_is_a_row_with_its_reason(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=64, architectures=["GPT2LMHeadModel"]
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    found = niwaki.bench(tmp_path, variants=["bitmap", "contextual"], batches=(1,), **{**FAST, "prompt_tokens": 0})
    assert ["no" if row.reason else "yes" for row in found.rows] == ["yes", "no", "no"]
    assert "is the weight of an nn.Linear" in found.rows[1].reason and "q, k and v apart" in found.rows[2].reason
    assert len(found.rows[0].decode[0].tokens_per_s) == 2, "the dense model is measured all the same"


WRONG = [
    (["{shape}", "--forms", "bitmp"], "did you mean 'bitmap'"),
    (["{shape}", "--batch", "one"], "batch must be numbers such as 1,4,16"),
    (["{shape}", "--batch", "0"], "batches must be different numbers from 1 on"),
    (["{shape}", "--batch", "none", "--prompt", "0"], "nothing to measure"),
    (["{shape}", "--rounds", "0"], "rounds must be 1 or more, got 0"),
    (["{shape}", "--prompt", "65", "--context", "8", "--new", "8"], "exceed the 64 positions"),
    (["{shape}", "--plot", "{tmp}/bench.txt"], "ends in .png, .svg, .pdf"),
    (["{shape}", "--json", "{tmp}/gone/bench.json"], "does not exist"),
    (["{shape}", "{tmp}/gone", "--prompt", "8", "--context", "8", "--new", "8"], "no model folder at"),
    (["{tmp}/gone"], "no model folder at"),
    (["{shape}", "--device", "tpu"], "unknown device 'tpu'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_input_is_one_line_and_nothing_is_written(
    arguments: list[str], message: str, shape: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed, errors = run(capsys, "bench", *(part.format(shape=shape, tmp=tmp_path) for part in arguments))
    assert code == 2 and message in errors and errors.count("\n") == 1
    assert not printed and not list(tmp_path.iterdir())


def test_plots_without_matplotlib_say_what_to_install(
    shape: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    code, _, errors = run(capsys, "bench", shape, "--plot", tmp_path / "bench.svg")
    assert code == 2 and "pip install matplotlib" in errors


def test_random_weights_need_a_config_and_no_weights(shape: Path, tmp_path: Path) -> None:
    assert config_only_folder(shape) == shape
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    assert config_only_folder(tmp_path) is None and config_only_folder(tmp_path / "gone") is None
    one, other = (random_model(read_config(shape), torch.bfloat16, torch.device("cpu")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_what_is_written_is_cut_off_again_so_every_round_is_the_same(shape: Path) -> None:
    model = random_model(read_config(shape), torch.float32, torch.device("cpu"))
    lengths: list[int] = []
    model.register_forward_hook(
        lambda _, args, kwargs, out: lengths.append(out.past_key_values.get_seq_length()), with_kwargs=True
    )
    work = decode_work(model, torch.arange(1, 9)[None], 3, graphs=False)
    work.warm_up()
    work.run()
    work.run()
    assert lengths == [8, 9, 10, 9, 10, 11, 9, 10, 11]


def test_recorded_steps_write_for_every_sequence(shape: Path) -> None:
    model = random_model(read_config(shape), torch.float32, torch.device("cpu"))
    work = decode_work(model, torch.arange(1, 17).view(2, 8), 3, graphs=True)
    work.warm_up()
    assert work.run() > 0 and not model._forward_hooks


def test_windows_are_seen() -> None:
    windowed = transformers.MistralConfig(**SIZES, num_key_value_heads=8, sliding_window=6)
    device = torch.device("cpu")
    assert has_window(random_model(windowed, torch.float32, device))
    assert not has_window(random_model(transformers.LlamaConfig(**SIZES), torch.float32, device))
