"""Every path that scores text makes its logits within the budget, and finds what whole logits find."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import niwaki
from niwaki.compression.recover import recover
from niwaki.measure.prompt_gate import calibrate_gate
from support.models import tiny_llama, weights_of, write_texts
from support.tasks import questions, write_task

VOCABULARY = 4096
BUDGET = 9 * 4 * VOCABULARY  # nine positions: a probe of the structure has eight


class Spy:
    """The bytes of the largest logits of a head since the last call, and the positions of all."""

    def __init__(self) -> None:
        self.largest = self.made = 0

    def __call__(self, module: nn.Module, _args: Any, out: Any) -> None:
        if isinstance(module, nn.Linear) and out.shape[-1] == VOCABULARY:
            self.largest, self.made = max(self.largest, 4 * out.numel()), self.made + out.numel() // VOCABULARY

    def take(self) -> int:
        """Return the bytes, and begin again."""
        largest, self.largest, self.made = self.largest, 0, 0
        return largest


@pytest.fixture
def spy() -> Iterator[Spy]:
    found = Spy()
    hook = register_module_forward_hook(found)
    yield found
    hook.remove()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a dense model, a pruned one, a contextual one, a text and a task."""
    folder = tmp_path_factory.mktemp("budget")
    dense = tiny_llama(folder / "dense", num_key_value_heads=4)
    text = write_texts(folder / "text.jsonl")
    calibration = {"files": str(text), "samples": 12, "seq_len": 48}
    niwaki.compress(dense, folder / "pruned", method="magnitude", target="0.5", device="cpu")
    niwaki.compress(
        dense, folder / "contextual", method="shadow", target="0.5", device="cpu", calibration=calibration,
        options={"unit": "prompt", "size_frac": 0.5, "criterion": "plainact", "head_criterion": "plainact"},
    )  # fmt: skip
    task = write_task(folder / "tasks", questions(12))
    return {
        "dense": dense,
        "pruned": folder / "pruned",
        "contextual": folder / "contextual",
        "text": text,
        "task": task,
    }


def numbers(value: Any) -> Iterator[float]:
    """Yield all numbers of a result, in order."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name not in ("date", "seconds", "command", "logit_bytes"):
                yield from numbers(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def check(spy: Spy, run: Callable[[int | None], Any], limit: int = BUDGET) -> None:
    """Compare a run in slices with one without, and the logits of both with the budget."""
    whole = list(numbers(run(None)))
    assert spy.take() > limit, "without a budget this path makes more"
    sliced = list(numbers(run(limit)))
    assert 0 < spy.take() <= limit
    assert len(whole) > 2 and sliced == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_evaluation(world: dict[str, Path], spy: Spy) -> None:
    def run(limit: int | None) -> Any:
        return niwaki.evaluate(
            world["pruned"], reference=world["dense"], data=world["text"], tasks=world["task"], seq_len=32,
            max_tokens=128, device="cpu", logit_bytes=limit,
        )  # fmt: skip

    check(spy, run)


def test_tasks_make_logits_for_continuations_only(world: dict[str, Path], spy: Spy) -> None:
    niwaki.evaluate(world["dense"], tasks=world["task"], limit=4, device="cpu")
    rows = questions(12)[:4]
    from niwaki.data.texts import load_tokenizer

    tokenizer = load_tokenizer(world["dense"])
    pairs = [pair for row in rows for pair in row["pairs"]]
    wanted = sum(len(tokenizer(a + b)["input_ids"]) - len(tokenizer(a)["input_ids"]) for a, b in pairs)
    assert wanted <= spy.made <= wanted + 2 + 8, (
        "one position of each batch on its way in, and the probe of the structure"
    )
    assert spy.made < sum(len(tokenizer(a + b)["input_ids"]) for a, b in pairs) // 2


def test_tasks_of_lm_eval(world: dict[str, Path], spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)

    def run(limit: int | None) -> Any:
        found = niwaki.evaluate(
            world["dense"], lm_eval="mine", include_path=world["task"].parent, device="cpu", logit_bytes=limit
        )
        return found["lm_eval"]["results"]["mine"]

    check(spy, run)


@pytest.mark.parametrize("candidate", ["pruned", "contextual"])
def test_comparison(candidate: str, world: dict[str, Path], spy: Spy) -> None:
    def run(limit: int | None) -> Any:
        found = niwaki.compare(
            world["dense"], world[candidate], data=world["text"], tasks=world["task"], seq_len=40, max_tokens=120,
            limit=6, rounds=0, device="cpu", logit_bytes=limit,
        )  # fmt: skip
        return [found.candidates[0].data[0].model_dump(), found.candidates[0].tasks[0].model_dump()]

    check(spy, run)


@pytest.mark.parametrize("method", ["gblm", "shadow", "comp"])
def test_compression(method: str, world: dict[str, Path], spy: Spy, tmp_path: Path) -> None:
    options = {"comp": {"try_blocks": 1, "try_heads": 1, "multiple": 8}, "shadow": {"max_ratio": 9e9}}

    def run(limit: int | None) -> Any:
        out = tmp_path / str(limit)
        record = niwaki.compress(
            world["dense"], out, method=method, target="0.5" if method != "comp" else "0.3", device="cpu",
            calibration={"files": str(world["text"]), "samples": 8, "seq_len": 32},
            options=options.get(method, {}), logit_bytes=limit,
        )  # fmt: skip
        weights = {name: float((tensor.float() != 0).double().mean()) for name, tensor in weights_of(out).items()}
        return [weights, (record["result"].get("predictor") or {}).get("tried", {})]

    check(spy, run)


def test_recovery(world: dict[str, Path], spy: Spy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(limit: int | None) -> Any:
        if limit is not None:
            monkeypatch.setattr("niwaki.model.logits.LOGIT_BYTES", limit)
        record = recover(
            world["pruned"], tmp_path / str(limit), data=str(world["text"]), steps=2, batch=2, seq_len=32,
            rank=2, rate=0.005, device="cpu",
        )  # fmt: skip
        return [record["result"]["heldout_loss"], record["result"]["heldout_loss_before"], record["result"]["zeros"]]

    check(spy, run)


def test_the_gate_of_prompts(world: dict[str, Path], spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(limit: int | None) -> Any:
        if limit is not None:
            monkeypatch.setattr("niwaki.model.logits.LOGIT_BYTES", limit)
        return calibrate_gate(
            world["contextual"], data=world["text"], samples=2, prompt_tokens=24, new_tokens=8, device="cpu"
        )

    check(spy, run)
