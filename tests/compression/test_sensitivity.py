"""`niwaki inspect MODEL --sensitivity`: what blocks and matrices bear, as text and as JSON, and what it predicts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import niwaki
from niwaki.cli.demo import demo_texts, sapling
from niwaki.cli.sensitivity import in_words
from niwaki.compression.sensitivity import measure_sensitivity
from niwaki.compression.walk import collect, forward
from niwaki.config.recipe import Calibration
from niwaki.config.targets import Bits
from niwaki.data.statistics import Needs
from niwaki.data.stream import CalibrationData, Stream
from niwaki.data.texts import load_tokenizer, windows_for
from niwaki.methods import rtn
from niwaki.model.decoder import Block, open_decoder
from support.families import build, families
from support.models import CPU, add_tokenizer, file_bytes, run, tiny_llama, write_texts

BLOCKS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sensitivity") / "model"
    return tiny_llama(folder, blocks=BLOCKS, hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("text") / "text.jsonl")


def calibration(text: Path) -> dict[str, Any]:
    return {"files": (str(text),), "samples": 4, "seq_len": 16}


@pytest.fixture(scope="module")
def found(model: Path, text: Path) -> dict[str, Any]:
    return measure_sensitivity(model, calibration=calibration(text), device="cpu")


def test_the_one_bit_loss_is_the_energy_of_what_one_bit_loses(model: Path, text: Path, found: dict[str, Any]) -> None:
    """Compare with float64 sums over the inputs themselves, for the second block."""
    decoder = open_decoder(model, CPU, torch.float32)
    ids = windows_for(Calibration(**calibration(text)), decoder, seed=0, report=lambda event, **fields: None).ids_ST
    stream, inputs = Stream(decoder, ids), {}
    stream.advance(decoder.load(0))
    block = decoder.load(1)
    stream.observe(block, lambda name, x: inputs.setdefault(name, []).append(x.reshape(-1, x.shape[-1]).double()))
    for name, entry in found["blocks"][1]["matrices"].items():
        weight, x = block.weight(name).double(), torch.cat(inputs[name])
        middle = weight.mean(1, keepdim=True)
        binary = middle + (weight - middle).sign() * (weight - middle).abs().mean(1, keepdim=True)
        energies = ((weight - binary).square() * x.square().sum(0)).sum(0)
        lost = energies.sum() / (x @ weight.T).square().sum()
        assert entry["lost"] == pytest.approx(float(lost), rel=0.1)  # of weights before they are rounded to four bits
        worst = energies.sort(descending=True).values[: round(0.2 * len(energies))].sum() / energies.sum()
        assert entry["salient_lost"] == pytest.approx(float(worst), rel=0.1)


def test_errors_and_allocations_are_those_of_compress(
    model: Path, text: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    request = {
        "method": "squeeze10", "options": {"rounds": 0, "learn_rounds": 0}, "calibration": calibration(text),
        "device": "cpu", "target": "2.5bit",
    }  # fmt: skip
    auto = niwaki.compress(model, tmp_path / "auto", keep_blocks="auto", **request)["allocation"]
    assert [block["error"] for block in found["blocks"]] == auto["sensitivities"]
    assert found["keep_blocks"]["2.5bit"] == auto.get("kept_blocks", [])
    by_need = niwaki.compress(model, tmp_path / "need", **request)
    for block, errors in zip(found["blocks"], by_need["allocation"]["sensitivities"], strict=True):
        assert {name: entry["error"] for name, entry in block["matrices"].items()} == errors
    lines = [json.loads(line) for line in (tmp_path / "need/niwaki/blocks.jsonl").read_text().splitlines()]
    for kind, bits in found["bits"]["2.5bit"].items():
        own = [float(line["target"].removesuffix("bit")) for line in lines if line["matrix"] == kind]
        assert bits == pytest.approx(sum(own) / len(own), abs=1e-4)
    assert found["calibration"]["windows"] == [4, 16]
    assert sum(block["share"] for block in found["blocks"]) == pytest.approx(1)
    damages = [block["damage"] for block in found["blocks"]]
    assert found["most_sensitive"][0] == damages.index(max(damages))
    assert found["least_sensitive"][0] == damages.index(min(damages))


def test_the_command_fits_80_columns_says_it_in_words_and_writes_nothing(
    model: Path, text: Path, found: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    before = file_bytes(model)
    flags = ("--sensitivity", "--calibration", text, "--samples", 4, "--seq-len", 16, "--device", "cpu")
    code, printed, _ = run(capsys, "inspect", model, *flags)
    assert code == 0 and max(map(len, printed.splitlines()[1:])) <= 80
    for word in ("2-bit error", "1-bit loss", "mlp.down_proj", "Most sensitive: blocks", "Least sensitive: blocks"):
        assert word in " ".join(printed.split())
    assert " ".join(in_words(found)) in " ".join(printed.split())
    code, printed, _ = run(capsys, "inspect", model, *flags, "--json")
    told = json.loads(printed)
    assert code == 0 and told == json.loads(json.dumps(found))
    assert not list(tmp_path.iterdir()) and file_bytes(model) == before


WRONG: list[tuple[list[str], str]] = [
    (["--sensitivity", "--why", "model.layers.0.mlp.up_proj"], "give one of them"),
    (["--samples", "4"], "text, seed, device and dtype belong to --sensitivity"),
    (["--sensitivity", "--calibration", "missing.jsonl"], "missing.jsonl"),
    (["--sensitivity", "--device", "tpu"], "tpu"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_requests_are_one_line(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    more = [] if "--calibration" in arguments or "--samples" in arguments else ["--calibration", str(text)]
    code, printed, told = run(capsys, "inspect", model, *arguments, *more)
    assert code == 2 and not printed
    (line,) = [line for line in told.splitlines() if line.strip()]
    assert line.startswith("error: ") and message in line


def test_experts_without_a_token_have_errors_and_no_one_bit_loss(text: Path, tmp_path: Path) -> None:
    config = families()["qwen3_moe"].config
    config.vocab_size = 4096
    build(config).save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    given = {"files": (str(text),), "samples": 1, "seq_len": 2}
    found = measure_sensitivity(tmp_path / "model", calibration=given, device="cpu")
    lost = {name: one["lost"] for block in found["blocks"] for name, one in block["matrices"].items()}
    assert any(value is None for name, value in lost.items() if ".experts." in name)
    assert all(value is not None for name, value in lost.items() if "self_attn" in name)
    assert any(".*" in kind for kind in found["kinds"])


def test_the_order_of_the_blocks_is_that_of_the_damage(tmp_path: Path) -> None:
    """Round one block of the sapling at a time, and compare the rise of the loss with the look (Spearman)."""
    texts, held = demo_texts()
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    given = {"files": (str(path),), "samples": 4, "seq_len": 128}
    found = measure_sensitivity(sapling(), calibration=given, device="cpu", dtype="float32")
    decoder = open_decoder(sapling(), CPU, torch.float32)
    tokenizer = load_tokenizer(sapling())
    ids = torch.tensor(tokenizer("\n".join(held)[:20_000]).input_ids[: 4 * 256]).view(4, 256)
    whole = AutoModelForCausalLM.from_pretrained(sapling(), dtype=torch.float32).eval()
    losses: list[float] = []

    @torch.no_grad()
    def visit(block: Block) -> None:
        calib = CalibrationData(collect(block, Stream(decoder, ids[:1]), Needs())[0])
        config = rtn.Config(group=64)
        records = rtn.compress(block, calib, dict.fromkeys(block.linears, Bits(2)), config, torch.Generator())
        layer = whole.model.layers[block.index]
        for name, record in records.items():
            layer.get_parameter(f"{name}.weight").copy_(record.decode(torch.float32))
        losses.append(float(whole(input_ids=ids, labels=ids).loss))
        for name in records:
            layer.get_parameter(f"{name}.weight").copy_(block.weight(name))

    forward(decoder, [], visit)
    damages = torch.tensor([block["damage"] for block in found["blocks"]])
    orders = damages.argsort(descending=True), torch.tensor(losses).argsort(descending=True)
    assert set(orders[0][:3].tolist()) == set(orders[1][:3].tolist()), (damages, losses)  # the others hardly differ
    ranks = torch.stack([order.argsort() for order in orders]).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.6, (damages, losses)
