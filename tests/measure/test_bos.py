"""Evaluation, comparison and lm_eval begin every text alike, say so, and warn of a model that misses its token."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import niwaki
from niwaki.data.documents import read_texts
from niwaki.data.texts import evaluation_windows, load_tokenizer
from niwaki.errors import CalibrationError
from niwaki.measure.compare.token_metrics import decode_one
from niwaki.measure.schema import read_comparison
from support.models import Warnings, add_bos, blind_without_bos, run, tiny_llama, write_texts

SEQ_LEN, TOKENS = 32, 320
COMPARED: dict[str, Any] = {"seq_len": SEQ_LEN, "max_tokens": TOKENS, "device": "cpu"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_texts(tmp_path_factory.mktemp("text") / "text.jsonl", 30))


@pytest.fixture
def blind(tmp_path: Path) -> Path:
    """Return a model that needs its bos token, which its tokenizer names and does not put."""
    blind_without_bos(tmp_path / "blind")
    add_bos(tmp_path / "blind", itself=False)
    return tmp_path / "blind"


def perplexity(model: Path, ids_ST: torch.Tensor) -> float:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logprobs = loaded(ids_ST).logits[:, :-1].log_softmax(-1)
    return math.exp(-float(logprobs.gather(2, ids_ST[:, 1:, None]).double().mean()))


def test_perplexity_is_that_of_windows_with_the_token(blind: Path, text: str) -> None:
    add_bos(blind)
    ids_ST = evaluation_windows(read_texts([text]), load_tokenizer(blind), seq_len=SEQ_LEN, max_tokens=TOKENS)
    assert (ids_ST[:, 0] == 4096).all() and ids_ST.numel() == TOKENS
    events = Warnings()
    found = niwaki.evaluate(blind, data=text, report=events, **COMPARED)
    assert found["bos"] == "on" and found["tokens"][text] == TOKENS and events.warnings == []
    assert found["perplexity"][text] == pytest.approx(perplexity(blind, ids_ST), rel=1e-5)
    off = niwaki.evaluate(blind, data=text, bos="off", report=events, **COMPARED)
    assert off["bos"] == "off" and off["perplexity"][text] > 10 * found["perplexity"][text]


def test_a_missed_token_is_warned_of_once(blind: Path, text: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    niwaki.compress(blind, other, method="magnitude", target="2:4", device="cpu")
    events = Warnings()
    niwaki.evaluate(blind, reference=blind, data=[text], report=events, **COMPARED)
    assert len(events.warnings) == 1 and "pass --bos on" in events.warnings[0]
    events = Warnings()
    niwaki.compare(blind, [other], data=text, rounds=0, progress=events, **COMPARED)
    assert len(events.warnings) == 1 and "falls from" in events.warnings[0]
    events = Warnings()
    niwaki.compare(blind, [other], data=text, rounds=0, progress=events, bos="on", **COMPARED)
    assert events.warnings == []
    with pytest.raises(CalibrationError, match="bos policy 'yes'"):
        niwaki.evaluate(blind, data=text, bos="yes", **COMPARED)  # type: ignore[arg-type]


def test_a_comparison_says_what_was_done_and_prompts_begin_once(blind: Path, text: str, tmp_path: Path) -> None:
    add_bos(blind)
    niwaki.compress(blind, tmp_path / "out", method="magnitude", target="2:4", device="cpu")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The garden\n<bos>The garden\n")
    settings: dict[str, Any] = {**COMPARED, "rounds": 1, "prompt_tokens": 8, "new_tokens": 2}
    found = niwaki.compare(blind, [tmp_path / "out"], data=text, report=tmp_path / "report", **settings)
    assert found.settings.bos == "on" and "--bos on" in found.command
    content = json.loads((tmp_path / "report/compare.json").read_text())
    assert content["settings"]["bos"] == "on"
    assert all(
        one.prompt.count("<bos>") == 1 and one.prompt.startswith("<bos>") for one in found.candidates[0].generations
    )
    wanted = niwaki.evaluate(blind, data=text, **COMPARED)["perplexity"][text]
    assert found.candidates[0].data[0].whole.dense_perplexity == pytest.approx(wanted, rel=1e-6)
    again = niwaki.compare(blind, [tmp_path / "out"], data=text, prompts=prompts, **settings)
    first, second = (one.prompt for one in again.candidates[0].generations)
    assert first == second and first.startswith("<bos>The")
    del content["settings"]["bos"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert read_comparison(tmp_path / "old.json").settings.bos == "off"
    assert decode_one(load_tokenizer(blind), 4096) == "<bos>"


def test_the_commands_take_it(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama(tmp_path / "model", blocks=1, vocab_size=4160)
    add_bos(model, itself=False)
    common = ("--seq-len", SEQ_LEN, "--max-tokens", TOKENS, "--device", "cpu")
    for bos, state in ((), "off"), (("--bos", "on"), "on"):
        code, _, told = run(
            capsys, "evaluate", model, "--data", text, *common, *bos, "--json", tmp_path / "scores.json"
        )
        assert code == 0, told
        assert json.loads((tmp_path / "scores.json").read_text())["bos"] == state
    for command in ("evaluate", "compare"):
        sources = (model, model) if command == "compare" else (model,)
        code, _, told = run(capsys, command, *sources, "--data", text, "--bos", "maybe")
        assert code == 2 and "--bos 'maybe'" in told and "auto, off, on" in told
