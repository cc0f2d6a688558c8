"""Blocks kept at four bits: exact budgets, the best choice, and requests that cannot be met."""

import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import niwaki
from niwaki.cli.app import main
from niwaki.compression.bit_allocation import (
    KEPT_BITS,
    choose_kept,
    kept_targets,
    rest_bits,
    sensitivities,
    sensitivity,
    spread_bits,
)
from niwaki.config.targets import NM, Bits
from niwaki.data.stream import Stream
from niwaki.errors import InputError, NumericalError, TargetError
from niwaki.methods import squeeze10
from niwaki.model.anatomy import Anatomy, BlockAnatomy, Linear
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from support.families import build, families
from support.models import CPU, Warnings, add_tokenizer, file_bytes, tiny_llama, write_texts

BLOCKS = 4
QUICK = {"rounds": 0, "learn_rounds": 0}  # what is learned changes no number of bits


def anatomy_of(*rows: int, columns: int = 4096) -> Anatomy:
    """Return blocks of one matrix each."""
    return Anatomy(
        "layers",
        tuple(BlockAnatomy({"m": Linear("m", "m.weight", None, False, r, columns, "m")}, {}, None) for r in rows),
    )


def min_bits(rows: int, columns: int) -> float:
    """Return what squeeze10 needs with its defaults."""
    return squeeze10.min_bits(rows, columns, squeeze10.Config())


# --- the choice -------------------------------------------------------------------------------------------


def test_kept_blocks_and_the_rest_meet_the_target_on_average() -> None:
    anatomy = anatomy_of(64, 128, 32, 64)
    targets = kept_targets(anatomy, Bits(2.5), [2, 0])
    bits = [target["m"].bits for target in targets]  # type: ignore[union-attr]
    assert bits[0] == bits[2] == KEPT_BITS and bits[1] == bits[3] == rest_bits(anatomy, Bits(2.5), [0, 2])
    weights = [block.weights for block in anatomy.blocks]
    assert sum(b * w for b, w in zip(bits, weights, strict=True)) / sum(weights) == pytest.approx(2.5, abs=1e-12)
    assert kept_targets(anatomy, Bits(2.5), ()) == [{"m": Bits(2.5)}] * 4


@pytest.mark.parametrize("target", [1.05, 1.3, 1.75, 2.5, 3.9])
def test_equal_sensitivities_keep_none(target: float) -> None:
    assert choose_kept(anatomy_of(*[64] * 12), Bits(target), [0.1] * 12, min_bits) == []
    assert choose_kept(anatomy_of(*[64] * 12), Bits(target), [0.0] * 12, min_bits) == []


@pytest.mark.parametrize("target", [1.2, 1.75, 2.5])
@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_of_all_sets_of_equal_blocks(target: float, seed: int) -> None:
    anatomy = anatomy_of(*[64] * 7)
    sensitivities = (torch.randn(7, generator=torch.Generator().manual_seed(seed)) * 3).exp().tolist()

    def error(kept: tuple[int, ...]) -> float:
        rest = rest_bits(anatomy, Bits(target), kept)
        if rest < min_bits(64, 4096):
            return float("inf")
        return sum(s * 4 ** -(KEPT_BITS if index in kept else rest) for index, s in enumerate(sensitivities))

    every = [kept for count in range(7) for kept in itertools.combinations(range(7), count)]
    assert error(tuple(choose_kept(anatomy, Bits(target), sensitivities, min_bits))) == pytest.approx(
        min(map(error, every))
    )


def test_a_budget_without_room_keeps_none() -> None:
    anatomy = anatomy_of(*[64] * 4)
    assert min_bits(64, 4096) == 1 + 32 / 4096
    assert choose_kept(anatomy, Bits(1.005), [9.0, 0.1, 0.1, 0.1], min_bits) == []
    assert choose_kept(anatomy, Bits(2.0), [9.0, 0.1, 0.1, 0.1], min_bits) == [0]


@pytest.mark.parametrize(
    ("target", "kept", "message"),
    [
        (Bits(1.5), (4,), "keep_blocks 4: the model has blocks 0 to 3"),
        (NM(2, 4), (), "needs bits such as 1.75bit, got 2:4"),
        (Bits(4), (0,), "target 4bit gives every block 4 bits or more"),
        (Bits(1.5), (0,), "keep_blocks 0: at 4 bits they leave 0.67 bits of target 1.5bit to the others"),
        (Bits(3.9), (0, 1, 2, 3), "leave 0.00 bits"),
    ],
)
def test_what_cannot_be_kept_is_refused(target: Any, kept: tuple[int, ...], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        kept_targets(anatomy_of(64, 64, 64, 64), target, kept)


def spread(anatomy: Anatomy, target: float, sensitivities: list[float]) -> list[float]:
    found = spread_bits(anatomy, Bits(target), [{"m": s} for s in sensitivities], min_bits)
    return [block["m"].bits for block in found]  # type: ignore[union-attr]


def test_a_matrix_that_needs_more_than_four_bits_gets_them() -> None:
    """Give a tiny matrix its minimum at the cost of the others, as `plan` counts it."""
    anatomy = anatomy_of(64, 2)
    few = {"m": Linear("m", "m.weight", None, False, 2, 8, "m")}
    anatomy = Anatomy("layers", (anatomy.blocks[0], BlockAnatomy(few, {}, None)))
    large, small = spread(anatomy, 2.5, [1.0, 1.0])
    assert small == min_bits(2, 8) > KEPT_BITS
    assert (large * 64 * 4096 + small * 16) / (64 * 4096 + 16) == pytest.approx(2.5, abs=1e-9)


@pytest.mark.parametrize("target", [1.3, 1.75, 2.5, 3.5])
@pytest.mark.parametrize("seed", range(3))
def test_bits_by_sensitivity_meet_the_budget_at_the_least_error(target: float, seed: int) -> None:
    """Compare with every step of bits from one matrix to another: none lowers Σ s·4^(−bits)."""
    anatomy = anatomy_of(64, 128, 32, 64, 96)
    weights = [block.weights for block in anatomy.blocks]
    values = (torch.randn(5, generator=torch.Generator().manual_seed(seed)) * 2).exp().tolist()
    bits = spread(anatomy, target, values)
    assert sum(b * w for b, w in zip(bits, weights, strict=True)) / sum(weights) == pytest.approx(target, abs=1e-9)
    assert all(1 + 32 / 4096 <= b <= KEPT_BITS for b in bits)

    def error(found: list[float]) -> float:
        return sum(s * 4**-b for s, b in zip(values, found, strict=True))

    for giver, taker in itertools.permutations(range(5), 2):
        moved = list(bits)
        moved[giver] -= 1e-3 * weights[0] / weights[giver]
        moved[taker] += 1e-3 * weights[0] / weights[taker]
        if moved[giver] >= 1 + 32 / 4096 and moved[taker] <= KEPT_BITS:
            assert error(moved) >= error(bits) * (1 - 1e-12)


def test_equal_needs_and_budgets_without_room_leave_all_alike() -> None:
    anatomy = anatomy_of(64, 64, 64)
    assert spread(anatomy, 1.75, [0.2, 0.2, 0.2]) == pytest.approx([1.75] * 3)
    assert spread(anatomy, 1.75, [0.0, 0.0, 0.0]) == pytest.approx([1.75] * 3)
    assert spread(anatomy, 1.005, [9.0, 0.1, 0.1]) == [1.005] * 3  # the method refuses this
    assert spread(anatomy, 5.0, [9.0, 0.1, 0.1]) == [5.0] * 3
    assert spread(anatomy, 2.5, [1e9, 1.0, 1.0])[0] == KEPT_BITS


# --- the scan ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(
        tmp_path_factory.mktemp("budget") / "model", blocks=BLOCKS, hidden_size=128, intermediate_size=256
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("text") / "text.jsonl")


def test_sensitivity_is_the_mean_relative_error_of_tokens_and_changes_nothing(model: Path) -> None:
    decoder = Decoder(Checkpoint.open(model), CPU)
    ids_ST = torch.randint(0, 4096, (3, 8), generator=torch.Generator().manual_seed(0))
    stream = Stream(decoder, ids_ST, batch_tokens=16)  # batches of two windows and of one
    x_STD = stream.hidden.read(slice(0, 3)).clone()
    block = decoder.load(0)
    before = {name: block.weight(name).clone() for name in block.linears}
    found = sensitivity(block, stream)
    assert all(torch.equal(block.weight(name), weight) for name, weight in before.items())
    assert not block.result.parameters
    assert torch.equal(stream.hidden.read(slice(0, 3)), x_STD)

    def outputs() -> torch.Tensor:
        rows = [stream.hidden.read(slice(i, i + 1)) for i in range(3)]
        return torch.cat([block.run(stream.call([0], 0), x_BTD) for x_BTD in rows]).double()

    y_STD = outputs()
    with torch.no_grad():
        for name in block.linears:
            weight_OI = before[name].double()
            for row_I, out_I in zip(weight_OI, block.weight(name), strict=True):
                step = 0.9957 * (row_I - row_I.mean()).square().mean().sqrt()
                levels = row_I.mean() + step * torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64)
                out_I.copy_(levels[(row_I[:, None] - levels).abs().argmin(1)])
    wanted = ((outputs() - y_STD).square().sum(-1) / y_STD.square().sum(-1)).mean()
    assert found == pytest.approx(float(wanted), rel=1e-4)


def test_the_sensitivity_of_a_matrix_is_that_of_the_block_with_all_others_exact(model: Path) -> None:
    decoder = Decoder(Checkpoint.open(model), CPU)
    ids_ST = torch.randint(0, 4096, (3, 8), generator=torch.Generator().manual_seed(0))
    stream = Stream(decoder, ids_ST, batch_tokens=16)
    block = decoder.load(1)
    before = {name: block.weight(name).clone() for name in block.linears}
    found = sensitivities(block, stream)
    assert list(found) == list(block.linears) and all(value > 0 for value in found.values())
    assert all(torch.equal(block.weight(name), weight) for name, weight in before.items())
    with torch.no_grad():
        for name in block.linears:
            if name != "mlp.up_proj":
                block.weight(name).zero_()  # zero stays zero at any levels
    alone = sensitivities(block, stream)
    assert alone["mlp.down_proj"] == 0 and sensitivity(block, stream) == pytest.approx(sum(alone.values()), abs=1e-12)


def test_a_block_that_overflows_at_two_bits_is_an_error(model: Path) -> None:
    decoder = Decoder(Checkpoint.open(model), CPU)
    stream = Stream(decoder, torch.arange(16)[None])
    block = decoder.load(0)
    with torch.no_grad():
        block.weight("mlp.down_proj")[0, 0] = 3e38
    with pytest.raises(NumericalError, match="block 0 puts out NaN or infinite values with its matrices at two bits"):
        sensitivity(block, stream)


# --- whole runs -------------------------------------------------------------------------------------------


def settings(text: Path, **changes: Any) -> dict[str, Any]:
    return {
        "method": "squeeze10",
        "target": "2.25bit",
        "options": QUICK,
        "calibration": {"files": (str(text),), "samples": 4, "seq_len": 16},
        "device": "cpu",
        **changes,
    }


def bits_of(out: Path) -> list[float]:
    """Return stored bits a weight of every block, everything counted."""
    lines = [json.loads(line) for line in (out / "niwaki/blocks.jsonl").read_text().splitlines()]
    found = []
    for index in range(1 + max(line["block"] for line in lines)):
        own = [line for line in lines if line["block"] == index]
        found.append(8 * sum(line["bytes"] for line in own) / sum(line["shape"][0] * line["shape"][1] for line in own))
    return found


def test_the_budget_is_met_to_the_last_column(text: Path, tmp_path: Path) -> None:
    """Compare with the target, within 0.02 on average: eight columns more or less are 24 / 1024 bits here."""
    model = tiny_llama(
        tmp_path / "model", blocks=3, hidden_size=1024, intermediate_size=1024, num_key_value_heads=1, vocab_size=4096
    )
    record = niwaki.compress(model, tmp_path / "out", **settings(text, target="2.1bit", keep_blocks=[1]))
    first, kept, last = bits_of(tmp_path / "out")
    assert 3.97 < kept <= 4 and first == last
    rest = record["allocation"]["rest_bits"]
    assert rest - 0.025 < first <= rest == pytest.approx((3 * 2.1 - 4) / 2)
    assert 2.1 - 0.02 <= record["result"]["bits"] <= 2.1
    assert record["allocation"]["kept_blocks"] == [1] and record["recipe"]["keep_blocks"] == [1]


def test_bytes_are_a_budget_too(model: Path, text: Path, tmp_path: Path) -> None:
    budget = 150_000
    request = settings(text, target=None, target_bytes="150KB", keep_blocks="0")
    record = niwaki.compress(model, tmp_path / "out", **request)
    lines = [json.loads(line) for line in (tmp_path / "out/niwaki/blocks.jsonl").read_text().splitlines()]
    assert 0.95 * budget < sum(line["bytes"] for line in lines) <= budget
    weights = record["result"]["weights"]
    assert record["allocation"]["target_bits"] == 8 * budget / weights
    assert record["recipe"]["target"] is None and record["recipe"]["target_bytes"] == budget
    card = (tmp_path / "out/README.md").read_text()
    assert "150,000 bytes, blocks 0 kept at 4 bits" in card


def test_auto_is_recorded_and_a_resume_keeps_its_choice(model: Path, text: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(model, source)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith(("model.layers.0.", "model.layers.1.", "model.layers.3.")) and tensor.dim() == 2:
            tensor *= 0.01  # these blocks hardly change the hidden states, so block 2 matters most
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    request = settings(text, keep_blocks="auto")

    def stop(event: str, **fields: Any) -> None:
        if event == "saved" and fields["part"] == "block-00001":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        niwaki.compress(source, tmp_path / "out", report=stop, **request)
    scans: list[int] = []

    def count(event: str, **fields: Any) -> None:
        scans.extend([fields["index"]] if event == "scan" else [])

    record = niwaki.compress(source, tmp_path / "out", resume=True, report=count, **request)
    straight = niwaki.compress(source, tmp_path / "straight", report=count, **request)
    assert scans == [0, 1, 2, 3]  # the resumed run took what the journal held
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "straight")
    assert record["allocation"] == straight["allocation"]
    assert record["allocation"]["kept_blocks"] == [2]
    sensitivities = record["allocation"]["sensitivities"]
    assert max(sensitivities) == sensitivities[2] and len(sensitivities) == BLOCKS
    bits = bits_of(tmp_path / "out")
    assert max(bits) == bits[2] > 3.8 and record["result"]["bits"] <= 2.25
    events = [json.loads(line) for line in (tmp_path / "straight/niwaki/events.jsonl").read_text().splitlines()]
    told = [event for event in events if event["event"] == "allocation"]
    assert len(told) == 1 and told[0]["kept_blocks"] == [2]


def test_bits_by_sensitivity_keep_the_budget_and_survive_a_resume(model: Path, text: Path, tmp_path: Path) -> None:
    request = settings(text, target="2.5bit", options={**QUICK, "group": 64})  # sensitivity is squeeze10's default

    def stop(event: str, **fields: Any) -> None:
        if event == "saved" and fields["part"] == "block-00001":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        niwaki.compress(model, tmp_path / "out", report=stop, **request)
    record = niwaki.compress(model, tmp_path / "out", resume=True, **request)
    niwaki.compress(model, tmp_path / "straight", **request)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "straight")
    lines = [json.loads(line) for line in (tmp_path / "out/niwaki/blocks.jsonl").read_text().splitlines()]
    targets = {(line["block"], line["matrix"]): float(line["target"].removesuffix("bit")) for line in lines}
    assert len(set(targets.values())) > 10
    assert all(line["bits"] <= targets[line["block"], line["matrix"]] for line in lines)
    assert 2.3 < record["result"]["bits"] <= 2.5
    assert record["recipe"]["allocation"] == "sensitivity"
    found = record["allocation"]["sensitivities"]
    assert len(found) == BLOCKS and set(found[0]) == {line["matrix"] for line in lines}


def test_what_is_not_given_changes_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    record = niwaki.compress(model, tmp_path / "out", **settings(text, allocation="uniform"))
    niwaki.compress(model, tmp_path / "none", **settings(text, keep_blocks="none", allocation="uniform"))
    assert record["allocation"] == {} and record["recipe"]["keep_blocks"] == []
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "none")


WRONG: list[tuple[list[str], str]] = [
    (["--target", "1.9bit", "--keep-blocks", "4"], "keep_blocks 4: the model has blocks 0 to 3"),
    (["--target", "1.9bit", "--keep-blocks", "some"], "expected auto, none or numbers of blocks such as 0,7"),
    (["--target", "1.9bit", "--keep-blocks", "-1"], "expected auto, none or numbers of blocks"),
    (["--target", "1.9bit", "--keep-blocks", "0,1"], "they leave 0.00 bits of target 1.9bit to the others"),
    (["--target", "1.1bit"], "needs at least"),
    (["--target", "1.1bit", "--keep-blocks", "auto"], "needs at least"),
    (["--target", "1.8bit", "--keep-blocks", "0"], "needs at least"),  # 1.07 bits are left, scales take 0.25
    (["--target", "4bit", "--keep-blocks", "auto"], "target 4bit gives every block 4 bits or more"),
    (["--target", "2:4", "--method", "sparsegpt", "--keep-blocks", "0"], "keep_blocks needs a method that spends"),
    (["--target", "2:4", "--keep-blocks", "0"], "method squeeze10 meets bits such as 4bit, got target 2:4"),
    (
        ["--target", "2bit", "--method", "gptq", "--keep-blocks", "0"],
        "(squeeze10, trellis), got gptq: use another",
    ),
    (["--target", "4bit", "--method", "rtn", "--keep-blocks", "auto"], "(squeeze10, trellis), got rtn"),
    (["--target", "2bit", "--keep-blocks", "0", "--allocation", "sensitivity"], "both say where the bits go"),
    (["--target", "4bit", "--method", "gptq", "--allocation", "sensitivity"], "allocation sensitivity needs a method"),
    (["--target-bytes", "1MB", "--target", "2bit"], "target 2bit and target_bytes 1MB are two budgets: give one"),
    (["--target-bytes", "1MB", "--method", "wanda"], "target_bytes needs a method that spends any number of bits"),
    (["--target-bytes", "1MB", "--method", "gptq"], "target_bytes needs a method that spends any number of bits"),
    (["--target-bytes", "1MB", "--method", "gptqq"], "unknown method 'gptqq': did you mean 'gptq'"),
    (
        ["--target-bytes", "10KB"],
        "target_bytes 10,000: that is 0.136 bits for each of 589,824 weights, expected 1 to 8",
    ),
    (["--target-bytes", "2MB"], "give 73,728 to 589,824 bytes"),
    (["--target-bytes", "a lot"], "expected a number of bytes such as 1700000000, 1.7GB or 800MiB"),
    (["--set", "salient_frac=0.2", "--target", "1.6bit"], "salient_frac takes 2.1250 bits a weight in this model"),
    (["--set", "salient_frac=0.2", "--target-bytes", "150KB"], "target_bytes and salient_frac both say where the bits"),
    (["--set", "salient_frac=0.2", "--keep-blocks", "0"], "keep_blocks and salient_frac both say where the bits go"),
    (["--set", "salient_frac=0.2", "--allocation", "sensitivity"], "allocation sensitivity and salient_frac both say"),
    (["--set", "salient_frac=0.2", "--target", "2:4"], "method squeeze10 meets bits such as 4bit, got target 2:4"),
    (["--set", "salient_frac=1.2"], "salient_frac must lie between 0 and 1, got 1.2"),
    (["--set", "salient_frac=many"], "option salient_frac: expected float, got 'many'"),
    (["--set", "salient_frac=0"], "target is missing: give one"),
    (["--set", "salient_frac=0.2", "--method", "ptq161"], "target is missing: give one"),
    (["--target-bytes", "150KB", "--pack", "none"], "target_bytes counts stored codes, and --pack none stores none"),
    (
        ["--target-bytes", "150KB", "--set", "granularity=element", "--set", "widths=1+4"],
        "target_bytes counts stored codes, and granularity element stores none",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_requests_are_one_line_and_leave_nothing(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    quick = ["--method", "squeeze10", "--set", "rounds=0", "--set", "learn_rounds=0"]
    chosen = [] if "--method" in arguments else quick
    sys.argv = [
        "niwaki", "compress", str(model), str(tmp_path / "out"), *chosen, "--calibration", str(text), "--samples", "2",
        "--seq-len", "8", "--device", "cpu", *arguments,
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main()
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("measuring", "compressing"))]
    told = [line for line in told if not line.startswith("blocks at 4 bits")]
    assert stopped.value.code == 2
    assert len(told) == 1 and told[0].startswith("error: ") and message in told[0]
    assert not list(tmp_path.iterdir())


def test_bytes_of_matrices_that_are_stored_dense_are_refused(text: Path, tmp_path: Path) -> None:
    config = families()["qwen3_moe"].config
    config.vocab_size = 4096
    build(config).save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    with pytest.raises(TargetError, match=r"model\.layers\.0\.mlp\.experts\.0\.\w+ can only be stored dense"):
        niwaki.compress(tmp_path / "model", tmp_path / "out", **settings(text, target=None, target_bytes=50_000))
    assert not list(tmp_path.glob("out*"))


def test_a_named_share_needs_no_target_and_a_target_is_its_ceiling(model: Path, text: Path, tmp_path: Path) -> None:
    options = {**QUICK, "salient_frac": 0.2}
    record = niwaki.compress(model, tmp_path / "out", **settings(text, target=None, options=options))
    lines = [json.loads(line) for line in (tmp_path / "out/niwaki/blocks.jsonl").read_text().splitlines()]
    assert all(line["salient_columns"] == round(0.2 * line["shape"][1]) for line in lines)
    assert {(part["bits"], part["columns"]) for part in lines[0]["stored"]["parts"]} == {(4, 26), (1, 102)}
    bits = record["result"]["bits"]
    assert record["recipe"]["target"] == "2.125bit" and bits == 2.125
    assert record["recipe"]["allocation"] == "uniform" and record["options"]["squeeze10"]["salient_frac"] == 0.2
    planned = niwaki.plan(model, out=tmp_path / "out", **settings(text, target=None, options=options))
    assert planned["matrix_bits"] == pytest.approx(bits, abs=1e-4) and planned["recipe"]["target"] == "2.125bit"

    heard = Warnings()
    with_target = settings(text, target="3bit", options=options)
    niwaki.compress(model, tmp_path / "ceiling", report=heard, **with_target)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "ceiling")
    assert heard.warnings == ["salient_frac takes 2.125 bits a weight of target 3bit: the rest is not used"]
    again = niwaki.compress(model, tmp_path / "again", **settings(text, target="2.125bit", options=options))
    assert again["result"]["bits"] == bits
    both = {"squeeze10.salient_frac": 0.2, "squeeze10.learn_rounds": 0, "squeeze10.rounds": 0}
    preset = settings(text, target=None, options=both) | {"method": None, "preset": "fast"}
    niwaki.compress(model, tmp_path / "preset", **preset)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "preset")


def test_a_recipe_needs_a_target_of_either_kind(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="target is missing"):
        niwaki.compress(model, tmp_path / "out", **settings(text, target=None))
