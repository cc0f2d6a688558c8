"""One comparison of every kind of result, against definitions and against the other commands."""

import json
import math
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import niwaki
from niwaki.data.documents import read_texts
from niwaki.data.texts import evaluation_windows, load_tokenizer
from niwaki.errors import CalibrationError, InputError, MeasuringError, OutputError
from niwaki.measure.compare.inputs import read_prompts
from niwaki.measure.compare.worker import Worker, continue_greedily
from niwaki.measure.schema import Candidate, Comparison
from support.models import tiny_llama

SEQ_LEN, FIRST = 32, 16  # contextual results are scored after the first half of a window
ROUNDS, NEW = 6, 6
KINDS = ("plain", "packed", "structured", "contextual", "inputs")


def write_data(path: Path) -> Path:
    """Write a short document for every topic, of two domains and none."""
    rows = [{"text": topics[name][:120]} for name in sorted(topics)[:30]]
    for number, row in enumerate(rows):
        row.update({0: {"domain": "a"}, 1: {"domain": "b"}, 2: {}}[number % 3])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_questions(path: Path, count: int = 24) -> Path:
    words = [word for word in topics["assignment"].split() if word.isalpha()]
    rows = [
        {"pairs": [[" ".join(words[k : k + 5]), f" {words[k + 5 + choice]}"] for choice in (0, 1)], "gold": k % 2}
        for k in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a dense model, one result of every kind, a copy, data and questions."""
    folder = tmp_path_factory.mktemp("comparing")
    dense = tiny_llama(folder / "dense", num_attention_heads=8, num_key_value_heads=4)
    text = write_data(folder / "data.jsonl")
    write_questions(folder / "questions.jsonl")
    calibration = {"files": (str(text),), "samples": 12, "seq_len": 24}
    made: dict[str, dict[str, Any]] = {
        "plain": {"method": "magnitude", "target": "0.5"},
        "packed": {"method": "rtn", "target": "4bit", "options": {"group": 16}},
        "structured": {"method": "comp", "target": "0.3", "options": {"multiple": 4, "try_heads": 0}},
        "contextual": {
            "method": "shadow",
            "target": "0.5",
            "options": {"unit": "prompt", "min_prompt": 8, "features": "last", "size_frac": 0.5},
        },
        "inputs": {"method": "shadow", "target": "0.5", "options": {"min_prompt": 8}},
    }
    for name, recipe in made.items():
        niwaki.compress(dense, folder / name, calibration=calibration, device="cpu", **recipe)
    shutil.copytree(dense, folder / "copy")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Comparison:
    return niwaki.compare(
        folder / "dense", [folder / kind for kind in KINDS], data=folder / "data.jsonl",
        tasks=folder / "questions.jsonl", seq_len=SEQ_LEN, max_tokens=1600, rounds=ROUNDS, new_tokens=NEW,
        report=folder / "report", device="cpu",
    )  # fmt: skip


def one(found: Comparison, name: str) -> Candidate:
    return next(candidate for candidate in found.candidates if candidate.model.name == name)


@pytest.mark.parametrize("kind", ["plain", "packed", "structured"])
def test_streamed_quality_is_that_of_evaluate(folder: Path, found: Comparison, kind: str) -> None:
    path, task = str(folder / "data.jsonl"), str(folder / "questions.jsonl")
    wanted = niwaki.evaluate(
        folder / kind, reference=folder / "dense", data=path, tasks=task, seq_len=SEQ_LEN, max_tokens=1600, device="cpu"
    )
    candidate = one(found, kind)
    assert candidate.model.kind == kind and candidate.scoring.how == "streamed"
    quality, windows = candidate.data[0].whole, wanted["tokens"][path] // SEQ_LEN
    assert quality.tokens == windows * (SEQ_LEN - 1) and candidate.scoring.windows == windows
    assert quality.perplexity == pytest.approx(wanted["perplexity"][path], rel=1e-6)
    assert quality.dense_perplexity == pytest.approx(wanted["reference_perplexity"][path], rel=1e-6)
    assert quality.perplexity_ratio.value == pytest.approx(quality.perplexity / quality.dense_perplexity)
    assert quality.kl.value == pytest.approx(wanted["kl"][path], rel=1e-5)
    assert quality.top1_agreement.value == pytest.approx(wanted["top1_agreement"][path])
    answers, scores = candidate.tasks[0].accuracy, wanted["tasks"][task]
    assert (answers.accuracy, answers.dense_accuracy) == (scores["accuracy"], scores["reference"]["accuracy"])
    assert candidate.tasks[0].accuracy_norm.accuracy == scores["accuracy_norm"]
    assert candidate.model.file_bytes == wanted["bytes"]


@pytest.mark.parametrize("kind", ["contextual", "inputs"])
def test_contextual_quality_is_that_of_writing_token_by_token(folder: Path, found: Comparison, kind: str) -> None:
    """Compare with a loop over single tokens through the loaded model, in float32 as the comparison is."""
    candidate = one(found, kind)
    model = niwaki.load(folder / kind, device="cpu")
    windows_ST = evaluation_windows(
        read_texts([str(folder / "data.jsonl")]), load_tokenizer(folder / "dense"), seq_len=SEQ_LEN, max_tokens=1600
    )
    losses, dense_losses, kl, same = [], [], [], []
    for ids_T in windows_ST:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model.contextual.enabled = False
            dense_PV = model(ids_T[None], use_cache=False).logits[0, FIRST:-1].double().log_softmax(-1)
            model.contextual.enabled = True
            model(ids_T[None, :FIRST], past_key_values=cache, use_cache=True)
            steps = [
                model(ids_T[None, place : place + 1], past_key_values=cache, use_cache=True).logits[0, -1]
                for place in range(FIRST, SEQ_LEN - 1)
            ]
        assert model.contextual.records[-1].sparse_tokens == SEQ_LEN - 1 - FIRST
        model_PV = torch.stack(steps).double().log_softmax(-1)
        wanted_P1 = ids_T[FIRST + 1 :, None]
        losses.append(-model_PV.gather(1, wanted_P1))
        dense_losses.append(-dense_PV.gather(1, wanted_P1))
        kl.append((dense_PV.exp() * (dense_PV - model_PV)).sum(-1))
        same.append(dense_PV.argmax(-1) == model_PV.argmax(-1))
    quality = candidate.data[0].whole
    assert candidate.model.kind == "contextual"
    assert candidate.scoring.how == "runtime" and candidate.scoring.first_tokens == FIRST
    assert (candidate.scoring.windows, candidate.scoring.dense_windows) == (len(windows_ST), 0)
    assert candidate.scoring.skipped_frac == pytest.approx(0.5, abs=0.1)
    assert quality.tokens == len(windows_ST) * (SEQ_LEN - 1 - FIRST)
    assert quality.perplexity == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-4)
    assert quality.dense_perplexity == pytest.approx(math.exp(torch.cat(dense_losses).mean()), rel=1e-4)
    assert quality.kl.value == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert quality.top1_agreement.value == pytest.approx(float(torch.cat(same).double().mean()), abs=2e-3)


def test_domains_share_out_the_tokens(found: Comparison) -> None:
    for candidate in found.candidates:
        data = candidate.data[0]
        assert set(data.domains) == {"a", "b", "(none)"}
        assert sum(part.tokens for part in data.domains.values()) == data.whole.tokens
        log = sum(part.tokens * math.log(part.perplexity) for part in data.domains.values())
        assert log / data.whole.tokens == pytest.approx(math.log(data.whole.perplexity))


def test_intervals_hold_their_values_and_count_documents(found: Comparison) -> None:
    for candidate in found.candidates:
        quality = candidate.data[0].whole
        assert quality.unit == "document" and 20 <= quality.units <= 30
        for estimate in (quality.perplexity_ratio, quality.kl, quality.top1_agreement):
            assert estimate.low is not None and estimate.high is not None
            assert estimate.low < estimate.value < estimate.high and estimate.units == quality.units


def test_flips_explain_the_loss(folder: Path, found: Comparison) -> None:
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    assert any(candidate.tasks[0].flips for candidate in found.candidates)
    for candidate in found.candidates:
        task = candidate.tasks[0]
        answers = task.accuracy
        net = len(answers.right_to_wrong) - len(answers.wrong_to_right)
        assert answers.loss.value == pytest.approx(net / 24)
        assert answers.loss.value == pytest.approx(answers.dense_accuracy - answers.accuracy)
        assert {flip.question for flip in task.flips} == {*answers.right_to_wrong, *answers.wrong_to_right}
        for flip in task.flips:
            right = rows[flip.question]["pairs"][rows[flip.question]["gold"]][1]
            assert flip.right == right
            assert (flip.dense == right) == (flip.question in answers.right_to_wrong) != (flip.candidate == right)


def test_worst_examples_are_the_worst_and_explain_themselves(folder: Path, found: Comparison) -> None:
    text = "".join(json.loads(line)["text"] for line in (folder / "data.jsonl").read_text().splitlines())
    for candidate in found.candidates:
        worst = candidate.worst
        assert len(worst) == 20
        assert [example.kl for example in worst] == sorted((example.kl for example in worst), reverse=True)
        assert worst[0].kl > candidate.data[0].whole.kl.value
        for example in worst:
            assert example.kl == pytest.approx(sum(token.kl for token in example.tokens) / len(example.tokens))
            first = "".join(token.token for token in example.tokens).split("<")[0]  # up to an end token
            assert first in text
        differing = [t for example in worst for t in example.tokens if t.dense_top1 != t.candidate_top1]
        assert differing


def test_speed_memory_and_loading_are_measured_in_turns(found: Comparison) -> None:
    assert found.dense.memory is not None and found.dense.load_seconds
    for candidate in found.candidates:
        assert candidate.speed is not None and candidate.model.load_seconds
        for pace, tokens in ((candidate.speed.prefill, 32), (candidate.speed.decode, NEW)):
            assert len(pace.dense_tokens_per_s) == len(pace.candidate_tokens_per_s) == ROUNDS
            assert pace.tokens == tokens and min(pace.dense_tokens_per_s + pace.candidate_tokens_per_s) > 0
            ratios = [d / c for d, c in zip(pace.dense_tokens_per_s, pace.candidate_tokens_per_s, strict=True)]
            ratio = pace.latency_ratio
            assert (ratio.low, ratio.high) == (pytest.approx(min(ratios)), pytest.approx(max(ratios)))
        memory = candidate.model.memory
        assert memory is not None and memory.before_bytes <= memory.peak_bytes >= memory.loaded_bytes > 0
        assert memory.device_peak_bytes is None, "no GPU here"


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_what_the_models_write(folder: Path, found: Comparison, kind: str) -> None:
    tokenizer = load_tokenizer(folder / "dense")
    document = json.loads((folder / "data.jsonl").read_text().splitlines()[0])["text"]
    ids = tokenizer(document, add_special_tokens=False)["input_ids"][:32]
    wanted = continue_greedily(niwaki.load(folder / kind, device="cpu"), ids, NEW, tokenizer.eos_token_id)[0]
    text = one(found, kind).generations[0]
    assert text.prompt == tokenizer.decode(ids)
    assert text.candidate == tuple(tokenizer.decode([token]) for token in wanted)
    assert text.candidate_text == tokenizer.decode(wanted)
    assert all(len(candidate.generations) == 5 for candidate in found.candidates)
    for text in one(found, kind).generations:
        place = text.diverges_at
        if place is None:
            assert text.dense == text.candidate
        else:
            assert text.dense[:place] == text.candidate[:place] and text.dense[place:] != text.candidate[place:]


def test_the_record_is_whole(folder: Path, found: Comparison) -> None:
    stored = Comparison.model_validate_json((folder / "report" / "compare.json").read_text())
    assert stored == found
    assert found.passed is None and found.gate is None
    assert [candidate.model.method for candidate in found.candidates] == [
        "magnitude",
        "rtn",
        "comp",
        "shadow",
        "shadow",
    ]
    assert one(found, "packed").bytes_ratio < 1 and one(found, "structured").bytes_ratio < 1
    shadow = one(found, "contextual").model
    assert shadow.file_bytes > found.dense.file_bytes and shadow.decoder_bytes == found.dense.decoder_bytes
    assert one(found, "packed").model.decoder_bytes < found.dense.decoder_bytes
    assert found.settings.prompt_tokens == 32, "half of the positions"
    command = found.command.split()
    assert command[:2] == ["niwaki", "compare"] and command[command.index("--seq-len") + 1] == "32"


def test_a_copy_does_not_differ(folder: Path) -> None:
    found = niwaki.compare(
        folder / "dense", folder / "copy", data=folder / "data.jsonl", tasks=folder / "questions.jsonl",
        seq_len=SEQ_LEN, rounds=0, device="cpu",
    )  # fmt: skip
    candidate = found.candidates[0]
    quality = candidate.data[0].whole
    assert (quality.perplexity_ratio.value, quality.kl.value, quality.top1_agreement.value) == (1, 0, 1)
    assert quality.top1_agreement.low is not None and quality.top1_agreement.low < 1, "other texts may differ"
    assert candidate.tasks[0].accuracy.mcnemar_p == 1 and candidate.tasks[0].flips == ()
    assert candidate.speed is None and candidate.generations == () and candidate.model.memory is None


def test_the_seed_decides_the_intervals(folder: Path) -> None:
    settings = {"data": folder / "data.jsonl", "seq_len": SEQ_LEN, "rounds": 0, "max_tokens": 960, "device": "cpu"}
    runs = [niwaki.compare(folder / "dense", folder / "plain", seed=seed, **settings) for seed in (0, 0, 1)]  # type: ignore[arg-type]
    assert runs[0].candidates == runs[1].candidates != runs[2].candidates


def test_prompts_come_from_a_file(folder: Path, tmp_path: Path) -> None:
    lines, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("The garden\n\nA tree\n")
    rows.write_text('{"prompt": "One\\ntwo"}\n')
    found = niwaki.compare(
        folder / "dense", folder / "plain", tasks=folder / "questions.jsonl", limit=4, prompts=lines, rounds=1,
        new_tokens=2, prompt_tokens=4, device="cpu",
    )  # fmt: skip
    assert [text.prompt for text in found.candidates[0].generations] == ["The garden", "A tree"]
    tokenizer = load_tokenizer(folder / "dense")
    (ids,) = read_prompts(found.settings.model_copy(update={"prompts": str(rows)}), tokenizer, [])
    assert tokenizer.decode(ids) == "One\ntwo"


def test_wrong_comparisons(folder: Path, tmp_path: Path) -> None:
    data, dense, plain = folder / "data.jsonl", folder / "dense", folder / "plain"
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    described = json.loads((other / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    (a, i), (b, j) = list(vocabulary.items())[300:302]
    vocabulary[a], vocabulary[b] = j, i
    (other / "tokenizer.json").write_text(json.dumps(described))
    empty, long = tmp_path / "empty.jsonl", tmp_path / "long.txt"
    empty.write_text('{"text": " "}\n')
    long.write_text("word " * 100)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "compare.json").write_text("{}")
    for candidates, arguments, error, message in [
        ([], {}, InputError, "give at least one candidate"),
        ([plain, plain], {}, InputError, "given twice"),
        ([plain], {"data": ()}, InputError, "give --data FILE or --tasks FILE"),
        ([plain], {"data": [data, data]}, InputError, "a file is given twice"),
        ([tmp_path / "gone"], {}, InputError, "no model folder at"),
        ([other], {}, InputError, "another tokenizer than .* vocabulary differs"),
        ([plain], {"data": empty}, CalibrationError, "no text in"),
        ([plain], {"data": tmp_path / "no.txt"}, CalibrationError, "no such text file"),
        ([plain], {"seq_len": 65}, CalibrationError, "longer than the 64 positions"),
        ([plain], {"seq_len": 1}, InputError, "seq_len must be at least 4, got 1"),
        ([plain], {"rounds": -1}, InputError, "rounds must be at least 0"),
        ([plain], {"prompt_tokens": 60, "new_tokens": 10}, InputError, "are 70 tokens, the models have 64 positions"),
        ([plain], {"new_tokens": 0}, InputError, "new_tokens must be at least 1"),
        ([plain], {"prompts": long}, CalibrationError, r"long\.txt:1: \d+ tokens and 16 new ones exceed"),
        ([plain], {"prompts": empty}, CalibrationError, r'empty\.jsonl:1: expected {"prompt": text}'),
        ([plain], {"report": theirs}, OutputError, "was not written by niwaki"),
        ([plain], {"report": tmp_path / "no" / "report"}, OutputError, "does not exist"),
        ([plain], {"gate": tmp_path / "no.yaml"}, InputError, "cannot read the gates"),
    ]:
        settings = {"data": data, "seq_len": SEQ_LEN, "device": "cpu", "report": tmp_path / "report", **arguments}
        with pytest.raises(error, match=message):
            niwaki.compare(dense, candidates, **settings)
        assert not (tmp_path / "report").exists()


def test_a_failing_process_says_why(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(MeasuringError, match="no model folder at"), Worker(tmp_path / "gone", "cpu"):
        pass
    with Worker(folder / "dense", "cpu") as worker:
        worker._process.kill()
        with pytest.raises(MeasuringError, match=r"its process ended \(exit -9\)"):
            worker.ask()
