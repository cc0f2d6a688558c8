"""Tasks of lm_eval on every kind of result, and our own scorer against it on the same items."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import niwaki
from niwaki.cli.app import main
from niwaki.cli.demo import sapling
from niwaki.data.texts import load_tokenizer
from niwaki.errors import InputError
from support.models import add_bos, tiny_llama, write_sentencepiece, write_texts
from support.tasks import TASK, questions, write_task


@pytest.fixture(autouse=True)
def _no_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the survey of lm_eval: in every run it calls compilers, drivers and packages. Nothing of it is kept."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def both(model: Path, folder: Path, data: Path, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (what our scorer says, what lm_eval says) of the same items."""
    found = niwaki.evaluate(model, tasks=data, lm_eval=data.stem, include_path=folder, device="cpu", **more)
    return found["tasks"][str(data)], found["lm_eval"]["results"][data.stem]


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert (ours["accuracy"], ours["accuracy_norm"]) == (theirs["acc,none"], theirs["acc_norm,none"])
    assert ours["accuracy_stderr"] == pytest.approx(theirs["acc_stderr,none"])
    assert ours["accuracy_norm_stderr"] == pytest.approx(theirs["acc_norm_stderr,none"])


def record_likelihoods(monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[float]]:
    """Return the log-likelihoods of all continuations, ours and lm_eval's, filled while both score."""
    from niwaki.measure.evaluate import tasks
    from niwaki.measure.evaluate.harness_model import HarnessModel

    ours: list[float] = []
    theirs: list[float] = []
    best, loglikelihood = tasks._best, HarnessModel.loglikelihood

    def recorded_best(values: list[float]) -> int:
        ours.extend(values)
        return best(values)

    def recorded(self: Any, requests: Any, disable_tqdm: bool = False) -> Any:
        found = loglikelihood(self, requests, disable_tqdm)
        theirs.extend(value for value, _ in found)
        return found

    monkeypatch.setattr(tasks, "_best", recorded_best)
    monkeypatch.setattr(HarnessModel, "loglikelihood", recorded)
    return ours, theirs


def test_our_scorer_agrees_on_the_sapling(tmp_path: Path) -> None:
    data = write_task(tmp_path / "tasks", questions(90))
    ours, theirs = both(sapling(), tmp_path / "tasks", data)
    assert ours["items"] == 90 and 0.4 < ours["accuracy"] < 1
    assert ours["accuracy"] != ours["accuracy_norm"], "items on which the two measures differ"
    assert_same(ours, theirs)


def awkward() -> list[dict[str, Any]]:
    """Return contexts that end in spaces, none at all, too long for the model, with the first token of texts."""
    rows = questions(30, words=80)
    for i, row in enumerate(rows):
        change = [
            lambda text: text,
            lambda text: text[:60] + " ",
            lambda text: "",
            lambda text: text[:40] + "\n\n",
            lambda text: "<s>" + text[:40],
        ][i % 5]
        row["pairs"] = [
            [change(context), end.lstrip() if change(context).endswith((" ", "\n")) else end]
            for context, end in row["pairs"]
        ]
    return rows


def test_no_pickled_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that niwaki asks for neither cache of lm_eval: requests and answers, both pickled."""
    import dill
    import sqlitedict

    def refuse(*given: object, **options: object) -> None:
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(dill, "load", refuse)
    monkeypatch.setattr(dill, "loads", refuse)
    monkeypatch.setattr(sqlitedict.SqliteDict, "__init__", refuse)
    data = write_task(tmp_path / "tasks", questions(2))
    model = tiny_llama(tmp_path / "model", blocks=1)
    found = niwaki.evaluate(model, lm_eval=data.stem, include_path=data.parent, device="cpu")
    assert found["lm_eval"]["results"][data.stem]


@pytest.mark.parametrize("first_token", [False, True], ids=["byte pairs", "a first token, ▁ for spaces"])
def test_our_scorer_agrees_on_awkward_contexts(
    first_token: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(tmp_path / "model", hidden_size=64, bos_token_id=1 if first_token else 0)
    if first_token:
        write_sentencepiece(model, 1000)
    tokenizer = load_tokenizer(model)
    rows = awkward()
    assert len(tokenizer(rows[0]["pairs"][0][0])["input_ids"]) > 64, "longer than the model's positions"
    data = write_task(tmp_path / "tasks", rows)
    ours, theirs = record_likelihoods(monkeypatch)
    assert_same(*both(model, tmp_path / "tasks", data))
    count = sum(len(row["pairs"]) for row in rows)
    assert len(theirs) == count and ours[:count] == pytest.approx(theirs, abs=1e-3), "not only the same choices"


@pytest.mark.parametrize(
    ("itself", "gemma", "bos", "begins"),
    [
        (True, False, "auto", True), (True, False, "on", True), (True, False, "off", False),
        (False, False, "auto", False), (False, False, "on", True), (False, True, "auto", True),
        (False, True, "off", False),
    ],
)  # fmt: skip
def test_both_scorers_begin_texts_alike(
    itself: bool, gemma: bool, bos: Any, begins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(tmp_path / "model", blocks=1, hidden_size=64, vocab_size=4160)
    (token,) = add_bos(model, itself=itself)
    if gemma:
        monkeypatch.setattr("niwaki.data.bos.GEMMA", "llama")
    from niwaki.measure.evaluate.harness_model import HarnessModel

    rows = [row for row in awkward() if "<s>" not in row["pairs"][0][0]][:8]
    data = write_task(tmp_path / "tasks", rows)
    ours, theirs = record_likelihoods(monkeypatch)
    contexts: list[list[int]] = []
    tokens = HarnessModel._loglikelihood_tokens

    def seen(self: Any, requests: Any, **rest: Any) -> Any:
        contexts.extend(context for _, context, _ in requests)
        return tokens(self, requests, **rest)

    monkeypatch.setattr(HarnessModel, "_loglikelihood_tokens", seen)
    assert_same(*both(model, tmp_path / "tasks", data, bos=bos))
    count = sum(len(row["pairs"]) for row in rows)
    assert len(theirs) == count and ours[:count] == pytest.approx(theirs, abs=1e-3)
    assert [token] in contexts, "an empty context always has it"
    assert {context[0] == token for context in contexts if len(context) > 1} == {begins}


@pytest.mark.parametrize(
    ("method", "target", "options"),
    [("gptq", "4bit", {"group": 16}), ("comp", "0.3", {"try_blocks": 1, "try_heads": 1, "multiple": 8})],
)
def test_packed_and_smaller_models_beside_their_dense_one(
    method: str, target: str, options: dict[str, Any], tmp_path: Path
) -> None:
    dense = tiny_llama(tmp_path / "dense", num_key_value_heads=4)
    text = write_texts(tmp_path / "text.jsonl")
    calibration = {"files": str(text), "samples": 8, "seq_len": 32}
    out = tmp_path / "out"
    niwaki.compress(dense, out, method=method, target=target, options=options, calibration=calibration, device="cpu")
    data = write_task(tmp_path / "tasks", questions(24))
    scores = niwaki.evaluate(
        out, reference=dense, tasks=data, lm_eval=["mine"], include_path=tmp_path / "tasks", limit=20, device="cpu"
    )
    ours, found = scores["tasks"][str(data)], scores["lm_eval"]
    assert ours["items"] == 20
    assert_same(ours, found["results"]["mine"])
    assert found["n-samples"]["mine"] == {"original": 24, "effective": 20}
    assert found["reference"]["results"]["mine"]["acc,none"] == ours["reference"]["accuracy"]
    json.dumps(found)
    assert "contextual" not in found


@pytest.mark.parametrize("options", [{"unit": "prompt", "size_frac": 0.5}, {"unit": "inputs", "max_ratio": 1000}])
def test_contextual_models_are_scored_as_they_write(options: dict[str, Any], tmp_path: Path) -> None:
    """Check scores against a loop: the first token of a continuation is the whole model's, the others a part's."""
    model, text = tmp_path / "out", write_texts(tmp_path / "text.jsonl")
    niwaki.compress(
        tiny_llama(tmp_path / "model", num_key_value_heads=4), model, method="shadow", target="0.5", device="cpu",
        calibration={"files": str(text), "samples": 12, "seq_len": 48},
        options=options,
    )  # fmt: skip
    rows = questions(6, words=20)
    write_task(tmp_path / "tasks", rows)
    result = niwaki.evaluate(model, lm_eval="mine", include_path=tmp_path / "tasks", device="cpu")
    with pytest.raises(InputError, match="skips weights by input"):
        niwaki.evaluate(model, data=text, device="cpu")
    found = result["lm_eval"]
    tokenizer, decoder = load_tokenizer(model), niwaki.load(model, device="cpu", dtype=torch.float32)
    right = sparse = 0
    for row in rows:
        scores = []
        for context, end in row["pairs"]:
            ids_1T = tokenizer(context + end, return_tensors="pt")["input_ids"]
            split = len(tokenizer(context)["input_ids"])
            with torch.no_grad():
                step = decoder(ids_1T[:, :split], use_cache=True)
                total = step.logits[0, -1].log_softmax(-1)[ids_1T[0, split]]
                for place in range(split, ids_1T.shape[1] - 1):
                    step = decoder(ids_1T[:, place : place + 1], past_key_values=step.past_key_values, use_cache=True)
                    total = total + step.logits[0, -1].log_softmax(-1)[ids_1T[0, place + 1]]
            scores.append(float(total))
            sparse += ids_1T.shape[1] - split - 1
        right += scores.index(max(scores)) == row["gold"]
    assert found["results"]["mine"]["acc,none"] == pytest.approx(right / len(rows))
    assert found["contextual"]["sparse_tokens"] == sparse > 0 == found["contextual"]["dense_tokens"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) of `niwaki evaluate ARGUMENTS`."""
    sys.argv = ["niwaki", "evaluate", *map(str, arguments)]
    code = 0
    try:
        main()
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_command_prints_and_writes_both_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama(tmp_path / "model")
    write_task(tmp_path / "tasks", questions(8))
    scores = tmp_path / "scores.json"
    given = ["--lm-eval", "mine", "--include-path", tmp_path / "tasks", "--json", scores, "--device", "cpu"]
    code, printed, _ = run(capsys, model, "--reference", model, *given)
    assert code == 0
    found = json.loads(scores.read_text())["lm_eval"]
    assert found["results"] == found["reference"]["results"] and found["n-shot"] == {"mine": 0}
    metrics = found["results"]["mine"]
    value = f"{metrics['acc_norm,none']:.4g} ± {metrics['acc_norm_stderr,none']:.2g}"
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if "│" in line]
    assert ["mine", "acc_norm", value, value] in rows


def test_without_the_package_one_line_tells_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(tmp_path / "model")
    monkeypatch.setattr("niwaki.measure.evaluate.harness.installed", lambda: False)
    code, printed, errors = run(capsys, model, "--lm-eval", "arc_easy", "--json", tmp_path / "scores.json")
    assert code == 2 and printed == "" and len(errors.splitlines()) == 1
    assert errors == "error: --lm-eval needs lm-evaluation-harness: pip install lm-eval\n"
    assert not (tmp_path / "scores.json").exists()


def test_what_is_wrong_is_told_before_anything_runs(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    data = write_task(tmp_path / "tasks", questions(4))
    (tmp_path / "tasks/broken.yaml").write_text(
        TASK.format(name="broken", data=tmp_path / "gone.jsonl", cache=tmp_path / "cache")
    )
    for arguments, message in [
        ({"lm_eval": "mine", "include_path": tmp_path / "gone"}, "expected a folder of task YAML files"),
        ({"include_path": tmp_path / "tasks", "tasks": data}, "name some with --lm-eval"),
        ({"lm_eval": "mine", "include_path": tmp_path / "tasks", "num_fewshot": -1}, "num_fewshot must be 0 or more"),
        ({"lm_eval": "broken", "include_path": tmp_path / "tasks"}, "lm_eval cannot load broken: FileNotFoundError"),
    ]:
        with pytest.raises(InputError, match=message):
            niwaki.evaluate(model, device="cpu", **arguments)  # type: ignore[arg-type]


def test_a_misspelt_task_gets_a_suggestion(tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", questions(4))
    with pytest.raises(InputError, match=r"unknown lm_eval task 'hellaswagg': did you mean 'hellaswag'\?"):
        niwaki.evaluate(tiny_llama(tmp_path / "model"), lm_eval="hellaswagg", include_path=tmp_path / "tasks")
