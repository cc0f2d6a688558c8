"""Statistics of experts that few tokens reach."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import niwaki
from niwaki.compression.experts import few_token_experts, shrink_experts
from niwaki.compression.plan.estimate import _walk
from niwaki.compression.plan.planner import plan_stages
from niwaki.compression.resolve import resolve
from niwaki.compression.run_record import read_lines
from niwaki.compression.walk import collect
from niwaki.config.recipe import make_recipe
from niwaki.data.statistics import Needs
from niwaki.data.stream import Stream
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from support.compressions import settings
from support.families import build, families
from support.models import CPU, Warnings, add_tokenizer, file_bytes, write_texts

LENT = 24


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """Return a random Qwen3-MoE with the sapling's tokenizer."""
    config = families()["qwen3_moe"].config
    config.vocab_size = 4096
    build(config).save_pretrained(tmp_path / "mixture")
    add_tokenizer(tmp_path / "mixture")
    return tmp_path / "mixture"


def test_shrunken_sums_agree_with_float64(mixture: Path) -> None:
    """Route every token again in float64, with the rows of the router rolled, and sum what each expert computes."""
    needs = Needs(gram=True, mean=True, held=True)
    decoder = Decoder(Checkpoint.open(mixture), CPU)
    ids_ST = torch.randint(4096, (5, 12), generator=torch.Generator().manual_seed(3))
    stream, block = Stream(decoder, ids_ST), decoder.load(0)
    router = block.module.mlp.gate.weight.clone()
    found, _ = collect(block, stream, needs)
    shrink_experts(block, stream, found, needs, LENT)
    assert torch.equal(block.module.mlp.gate.weight, router)

    inputs: list[Tensor] = []
    block.module.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double()))
    for row in range(5):
        block.run(stream.call(slice(row, row + 1), 0), stream.hidden.read(slice(row, row + 1)))
    experts, active = len(router), decoder.checkpoint.config.num_experts_per_tok
    own: dict[str, list[Tensor]] = {}
    lent: dict[str, list[Tensor]] = {}
    size = max(1, 5 // (experts - 1))
    for row, x_BTD in enumerate(inputs):
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        for shift, into in ((0, own), (1 + row // size % (experts - 1), lent)):
            chosen_NK = (x_ND @ router.double().roll(-shift, 0).T).topk(active).indices
            for expert in range(experts):
                taken_ND = x_ND[(chosen_NK == expert).any(1)]
                up = block.weight(f"mlp.experts.{expert}.gate_up_proj").double()
                gate_NI, up_NI = (taken_ND @ up.T).chunk(2, 1)
                into.setdefault(f"mlp.experts.{expert}.gate_up_proj", []).append(taken_ND)
                into.setdefault(f"mlp.experts.{expert}.down_proj", []).append(torch.nn.functional.silu(gate_NI) * up_NI)
    counts = set()
    for name in own:
        x_NI, p_NI = torch.cat(own[name]), torch.cat(lent[name])
        wanted_II = x_NI.T @ x_NI + LENT / max(len(p_NI), 1) * p_NI.T @ p_NI
        assert found[name].own_tokens == len(x_NI) and found[name].tokens == len(x_NI) + LENT * (len(p_NI) > 0)
        torch.testing.assert_close(found[name].gram_II.double(), wanted_II, rtol=1e-4, atol=1e-6)
        wanted_I = (x_NI.sum(0) + LENT * p_NI.mean(0)) / (len(x_NI) + LENT)
        torch.testing.assert_close(found[name].mean_I.double(), wanted_I, rtol=1e-4, atol=1e-6)
        counts.add(len(x_NI))
    assert len(counts) > 2
    assert found["self_attn.q_proj"].tokens == 60


def test_an_expert_that_no_token_reaches_is_compressed_by_those_of_the_others(mixture: Path, tmp_path: Path) -> None:
    text = write_texts(tmp_path / "text.jsonl")
    given: dict[str, Any] = settings(text, method="wanda", target="0.5")
    given["calibration"] = {"files": (str(text),), "samples": 1, "seq_len": 2}
    report = Warnings()
    niwaki.compress(mixture, tmp_path / "without", **given, report=report)
    record = niwaki.compress(mixture, tmp_path / "with", **given, expert_tokens=8)
    lines = {name: read_lines(tmp_path / name) for name in ("without", "with")}
    unreached = [number for number, line in enumerate(lines["without"]) if not line.tokens]
    assert unreached and all("no calibration token" in lines["without"][number].note for number in unreached)
    assert [line.tokens for line in lines["with"]] == [line.tokens for line in lines["without"]]
    assert any(not lines["with"][number].note for number in unreached)
    (warning,) = (text for text in report.warnings if "experts met" in text)
    assert " expert " in warning and "fewer calibration tokens than they have inputs (" in warning
    assert record["experts"].keys() == {"0", "1"} or len(record["experts"]) > 1
    assert sum(record["experts"]["0"]) == 2 * 2


def test_without_lent_tokens_the_bytes_are_those_of_before(mixture: Path, tmp_path: Path) -> None:
    text = write_texts(tmp_path / "text.jsonl")
    given = settings(text, method="sparsegpt", target="0.5")
    for name, more in (("default", {}), ("none", {"expert_tokens": 0}), ("some", {"expert_tokens": 64})):
        niwaki.compress(mixture, tmp_path / name, **given, **more)
    assert file_bytes(tmp_path / "default") == file_bytes(tmp_path / "none")
    assert file_bytes(tmp_path / "default") != file_bytes(tmp_path / "some")


def test_the_warning_names_the_experts_with_the_fewest_tokens(mixture: Path) -> None:
    anatomy = Decoder(Checkpoint.open(mixture), CPU).anatomy
    width = anatomy.blocks[0].linears["mlp.experts.0.gate_up_proj"].columns
    tokens = {"0": [width, 0, width - 1, width + 1], "1": [width] * 4}
    assert few_token_experts(anatomy, tokens) == (
        f"2 of 8 experts met fewer calibration tokens than they have inputs ({width}): block 0 expert 1 (0), block 0 "
        f"expert 2 ({width - 1}): give more text, or set expert_tokens"
    )
    assert few_token_experts(anatomy, {"1": [width] * 4}) == ""


def test_a_plan_counts_one_more_forward_of_blocks_with_experts(mixture: Path, tmp_path: Path) -> None:
    decoder = Decoder(Checkpoint.open(mixture), CPU)
    text = write_texts(tmp_path / "text.jsonl")
    works = []
    for lent in (0, 64):
        recipe = make_recipe({**settings(text, method="sparsegpt", target="0.5"), "expert_tokens": lent})
        (stage,) = plan_stages(decoder, resolve(recipe, decoder), "cpu")
        block = stage.model.blocks[0]
        works.append(_walk(block, block.scope(stage.work.windows, stage.work.tokens), stage.work).forward_tokens)
    assert works[1] - works[0] == 6 * 16
