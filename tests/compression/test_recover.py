"""Recovery: the divergence falls, zeros and codes keep their form, and what is written is what was trained."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import niwaki
from niwaki.cli.demo import demo_texts, sapling
from niwaki.compression.recover import dense_model_of, recover
from niwaki.compression.recovery import training
from niwaki.compression.recovery.teacher import Resident
from niwaki.compression.verify import check_weights
from niwaki.errors import InputError, OutputError, ResumeError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.logits import FinalStates
from support.families import build, families
from support.models import Warnings, add_bos, add_tokenizer, file_bytes, tiny_llama, weights_of, write_texts

SMALL: dict[str, Any] = {"steps": 8, "batch": 4, "seq_len": 32, "rate": 0.01, "rank": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_texts(tmp_path_factory.mktemp("text") / "text.jsonl"))


def compressed(model: Path, out: Path, text: str, method: str, target: str, **more: Any) -> Path:
    options: dict[str, Any] = {"rtn.group" if "+" in method else "group": 16} if method[-3:] in ("rtn", "ptq") else {}
    if method == "squeeze10":
        options = {"rounds": 1, "learn_rounds": 1, "samples": 4}
    if method == "trellis":
        options = {"rounds": 1, "learn_rounds": 0}
    if method == "comp":
        options = {"try_heads": 0}
    niwaki.compress(
        model, out, method=method, target=target, device="cpu", options=options,
        calibration={"files": (text,), "samples": 8, "seq_len": 32}, **more,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """Return a folder with a model and its results in every form."""
    folder = tmp_path_factory.mktemp("recovery")
    model = tiny_llama(folder / "model", blocks=2, dtype=torch.bfloat16, initializer_range=0.2)
    tiny_llama(folder / "wide", blocks=2, intermediate_size=96, hidden_size=64, initializer_range=0.2)
    compressed(model, folder / "zeros", text, "magnitude", "2:4")
    compressed(model, folder / "nonzeros", text, "magnitude", "2:4", pack="auto")
    compressed(model, folder / "bitmap", text, "magnitude", "0.6", pack="auto")
    compressed(model, folder / "codes", text, "gptq", "2bit")
    compressed(model, folder / "mixed", text, "squeeze10", "3bit")
    compressed(folder / "wide", folder / "paths", text, "trellis", "2.6bit")
    compressed(folder / "wide", folder / "some paths", text, "trellis", "2.6bit", blocks="1")
    compressed(model, folder / "tiles", text, "magnitude+rtn", "2:4+4bit", pack="auto")
    compressed(model, folder / "zero codes", text, "magnitude+rtn", "2:4+4bit")
    compressed(folder / "wide", folder / "smaller", text, "comp", "0.3")
    compressed(folder / "wide", folder / "ends", text, "rtn", "4bit", embeddings="8bit")
    return folder


FORMS = {
    "weights": [
        "zeros",
        "nonzeros",
        "bitmap",
        "codes",
        "mixed",
        "paths",
        "some paths",
        "tiles",
        "zero codes",
        "smaller",
        "ends",
    ],
    "low-rank": ["zeros", "mixed", "tiles"],
    "scales": ["tiles", "paths"],
}


@pytest.mark.parametrize(("train", "name"), [(train, name) for train, names in FORMS.items() for name in names])
def test_every_form_stays_and_the_loss_falls(name: str, train: Any, world: Path, text: str, tmp_path: Path) -> None:
    before = file_bytes(world / name)
    rate = 0.001 if name in ("smaller", "ends", "some paths") else 0.01
    record = recover(world / name, tmp_path / "out", data=text, train=train, **SMALL | {"rate": rate})
    assert file_bytes(world / name) == before
    result = record["result"]
    assert result["heldout_loss"] < result["heldout_loss_before"]
    old, new = (Checkpoint.open(folder) for folder in (world / name, tmp_path / "out"))
    assert old.packed.keys() == new.packed.keys() and old.shapes == new.shapes
    assert {name: info.dtype for name, info in old.records.items()} == {n: i.dtype for n, i in new.records.items()}
    assert new.nbytes <= old.nbytes + 64 and result["bytes"] == new.nbytes
    changed = 0
    old_weights, new_weights = weights_of(world / name), weights_of(tmp_path / "out")
    assert old_weights.keys() == new_weights.keys()
    for key, weight in new_weights.items():
        assert weight.dtype == old_weights[key].dtype and weight.isfinite().all()
        if name in ("zeros", "nonzeros", "bitmap", "tiles", "zero codes") and "_proj" in key:
            assert not weight[old_weights[key] == 0].any(), f"{key}: a zero was filled"
        if "_proj" not in key and "norm" not in key:
            assert torch.equal(weight, old_weights[key]), f"{key} is not learned"
        changed += not torch.equal(weight, old_weights[key])
    assert changed > 3
    assert niwaki.load(tmp_path / "out", device="cpu")(torch.arange(8)[None]).logits.isfinite().all()
    assert check_weights(tmp_path / "out") is not None


def stored(folder: Path, part: str) -> dict[str, torch.Tensor]:
    found = [load_file(shard) for shard in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for tensors in found for name, tensor in tensors.items() if part in name}


def planes_of(folder: Path) -> list[torch.Tensor]:
    return [tensor for _, tensor in sorted(stored(folder, "planes").items())]


def test_codes_move_and_stay_legal(world: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a rate at which latent numbers cross to other codes; in mode scales none does."""
    before = planes_of(world / "codes")
    monkeypatch.setattr(training, "CHECKS", 1)  # the last state is the best
    for train in ("weights", "scales"):
        given: dict[str, Any] = {**SMALL, "rate": 0.02, "steps": 48, "train": train}
        recover(world / "codes", tmp_path / train, data=text, **given)
    same = {
        train: sum(torch.equal(a, b) for a, b in zip(planes_of(tmp_path / train), before, strict=True))
        for train in ("weights", "scales")
    }
    assert same == {"scales": len(before), "weights": 0}


@pytest.mark.parametrize(
    ("name", "train", "told", "lowered"),
    [
        ("paths", "weights", "weights", 1.0),
        ("paths", "auto", "scales", 0.95),
        ("paths", "low-rank", "scales", 0.95),
        ("paths", "scales", "scales", 0.95),
        ("some paths", "auto", "weights", 1.0),
        ("some paths", "weights", "weights", 1.0),
    ],
)
def test_paths_of_a_trellis_are_searched_again_only_with_latent_weights(
    name: str, train: Any, told: str, lowered: float, world: Path, text: str, tmp_path: Path
) -> None:
    warned, rate = Warnings(), 0.03 if name == "paths" else 0.003
    record = recover(world / name, tmp_path / "out", data=text, report=warned, **SMALL | {"train": train, "rate": rate})
    warnings = [message for message in warned.warnings if "stay as they are" in message]
    assert len(warnings) == (train == "low-rank"), "who asks for thin matrices is told that codes stay"
    result = record["result"]
    assert result["heldout_loss"] < lowered * result["heldout_loss_before"]
    assert record["recover"]["train"] == told
    stay = ("columns", "levels") if told == "weights" else ("columns", "rings")
    for part in ("rings", "columns", "levels", "scale"):
        old, new = stored(world / name, part), stored(tmp_path / "out", part)
        same = sum(torch.equal(old[key], tensor) for key, tensor in new.items())
        assert old and old.keys() == new.keys()
        if part in stay:
            assert same == len(old)
        elif part == "rings":  # a path moves only when many steps agree, long ones here
            assert same < len(old) or name == "some paths"
        else:
            assert same < len(old) / 2
    levels = [tensor.view(torch.int8) for tensor in stored(tmp_path / "out", "levels").values()]
    assert all(int(level_S.min()) >= -127 for level_S in levels)
    if train == "auto":
        niwaki.export(tmp_path / "out", tmp_path / "gguf", to="gguf", type="f16")
        sources = (tmp_path / "out", next((tmp_path / "gguf").glob("*.gguf")))
        ids = torch.arange(24)[None]
        packed, plain = (niwaki.load(one, device="cpu", dtype=torch.float32)(ids).logits.detach() for one in sources)
        assert float((packed - plain).norm()) < 0.01 * float(packed.norm()), "float16 alone"


def test_the_written_model_has_the_divergence_that_was_reported(world: Path, text: str, tmp_path: Path) -> None:
    """Compare with float64, of the written files, on the windows that were held out."""
    from niwaki.data.documents import Documents
    from niwaki.data.texts import calibration_windows, load_tokenizer

    for name in ("zeros", "codes", "paths"):
        record = recover(world / name, tmp_path / name, data=text, **SMALL)
        dense = dense_model_of(world / name)
        size = {"samples": 32 + training.HELD_OUT, "seq_len": 32, "seed": 0, "at_most": True}
        tokenizer = load_tokenizer(world / "model")
        windows = calibration_windows(Documents([text], tokenizer=tokenizer), tokenizer, **size)
        held = windows[-min(len(windows) // 8, training.HELD_OUT) :]
        log_p = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float64)(held)
        log_q = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64)(held)
        p, q = log_p.logits.detach().log_softmax(-1), log_q.logits.detach().log_softmax(-1)
        divergence = float((p.exp() * (p - q)).sum(-1).mean())
        assert divergence == pytest.approx(record["result"]["heldout_loss"], rel=1e-3)


def test_the_dense_model_sees_the_held_out_windows_once(
    world: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Count the windows that both models run on; the result is that of a teacher that runs every time."""
    run, targets, seen = FinalStates.run, Resident.targets, dict[int, int]()

    def counted(self: FinalStates, ids_BT: torch.Tensor, **inputs: Any) -> torch.Tensor:
        seen[id(self.model)] = seen.get(id(self.model), 0) + len(ids_BT)
        return run(self, ids_BT, **inputs)

    monkeypatch.setattr(FinalStates, "run", counted)
    given = {"data": text, **SMALL}
    once = recover(world / "zeros", tmp_path / "once", **given)
    held = once["recover"]["windows"][0] // 8
    student, teacher = sorted(seen.values(), reverse=True)
    assert (teacher, student) == (32 + held, 32 + held * (1 + 8 + 1)), "before, after every step, and of the result"
    monkeypatch.setattr(Resident, "targets", lambda self, rows, ids_BT, again=False: targets(self, rows, ids_BT))
    seen.clear()
    recover(world / "zeros", tmp_path / "always", **given)
    assert len(set(seen.values())) == 1
    assert file_bytes(tmp_path / "always") == file_bytes(tmp_path / "once")


def test_lineage_text_and_memory_are_recorded(world: Path, text: str, tmp_path: Path) -> None:
    record = recover(world / "zeros", tmp_path / "out", data=text, mix=["self:0.5"], **SMALL)
    told = json.loads((tmp_path / "out/niwaki/run.json").read_text())
    assert told == record
    assert told["compressed_from"]["recipe"]["method"] == "magnitude"
    assert told["recover"]["teacher"]["source"] == str(world / "model")
    assert told["recover"]["mix"]["self"]["windows"] > 20 and told["recover"]["bos"] == "off"
    assert told["recover"]["memory"]["total"] > 0 and told["recover"]["train"] == "weights"
    again = recover(tmp_path / "out", tmp_path / "again", data=text, **SMALL)
    assert again["recover"]["teacher"]["source"] == str(world / "model"), "through the recovery to the dense model"
    assert dense_model_of(tmp_path / "again") == str(world / "model")


def test_without_a_teacher_the_text_is_learned(world: Path, text: str, tmp_path: Path) -> None:
    record = recover(world / "zeros", tmp_path / "out", data=text, teacher="none", **SMALL)
    result = record["result"]
    assert record["recover"]["teacher"] is None
    assert math.log(4096) - 2 < result["heldout_loss"] < result["heldout_loss_before"], "a loss of next tokens"


def test_a_recovery_lowers_the_perplexity_of_a_trained_model(tmp_path: Path) -> None:
    """Cut the sapling to 2:4, and win back perplexity on text that no training sees."""
    calibration, evaluation = demo_texts()
    for name, texts in (("text.jsonl", calibration), ("held.jsonl", evaluation)):
        (tmp_path / name).write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    niwaki.compress(sapling(), tmp_path / "cut", method="magnitude", target="2:4", device="cpu")
    recover(
        tmp_path / "cut", tmp_path / "out", data=str(tmp_path / "text.jsonl"), steps=10, batch=4, seq_len=64,
        rate=0.01, device="cpu",
    )  # fmt: skip

    def perplexity(model: Path) -> float:
        scores = niwaki.evaluate(model, data=[str(tmp_path / "held.jsonl")], seq_len=128, max_tokens=512, device="cpu")
        found: float = next(iter(scores["perplexity"].values()))
        return found

    dense, cut, out = (perplexity(model) for model in (sapling(), tmp_path / "cut", tmp_path / "out"))
    assert dense < out < cut - 0.3 * (cut - dense)


@pytest.mark.parametrize(
    ("name", "more"), [("zeros", {}), ("codes", {"train": "low-rank", "rate": 0.001}), ("paths", {"train": "weights"})]
)
def test_a_resume_ends_at_the_same_bytes_and_repeats_little(
    name: str, more: dict[str, Any], world: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"data": text, **SMALL, **more, "steps": 16}
    recover(world / name, tmp_path / "straight", **given)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    learn, steps = training.Trainer._learn, []

    def stopping(self: Any, rows: Any) -> None:
        steps.append(self.step)
        if self.step == 11 and steps.count(11) == 1:
            raise KeyboardInterrupt
        learn(self, rows)

    monkeypatch.setattr(training.Trainer, "_learn", stopping)
    with pytest.raises(KeyboardInterrupt):
        recover(world / name, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="continue it with --resume"):
        recover(world / name, tmp_path / "out", **given)
    with pytest.raises(ResumeError, match=r"changed since it began: config \(rate\)"):
        recover(world / name, tmp_path / "out", **given | {"rate": 0.02}, resume=True)
    recover(world / name, tmp_path / "out", **given, resume=True)
    assert steps == [*range(12), *range(11, 16)]
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "straight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "straight"]
    steps.clear()
    recover(world / name, tmp_path / "out", **given, resume=True)
    assert not steps, "a finished result is complete"


def test_the_best_state_stays_and_training_ends_early(
    world: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Give held-out losses after which the state of the third step is the result, PATIENCE steps before the end."""
    losses, states = [1.0, 0.9, 0.7, 0.5, *[0.6] * 20], []

    def held_out(self: training.Trainer) -> float:
        states.append([parameter.detach().clone() for parameter in self.trained.parameters])
        return losses[len(states) - 1] if len(states) < 10 else 0.5

    monkeypatch.setattr(training.Trainer, "held_out", held_out)
    monkeypatch.setattr(training, "PATIENCE", 6)
    record = recover(world / "codes", tmp_path / "out", data=text, **SMALL | {"steps": 16})
    assert record["result"]["steps"] == 3 + 6 and record["result"]["heldout_loss"] == 0.5
    assert len(states) == 11, "before, after nine steps, and of the result"
    assert not all(torch.equal(a, b) for a, b in zip(states[3], states[9], strict=True))
    packed = [b for a, b in zip(states[3], states[10], strict=True) if torch.equal(a, b)]
    assert len(packed) > 40, "norms are rounded to bfloat16, all others are those of the best step"


def test_a_recovery_that_does_not_help_writes_nothing(world: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did not lower the held-out loss"):
        recover(world / "zeros", tmp_path / "out", data=text, **SMALL | {"rate": 1e-12, "steps": 1})
    assert not list(tmp_path.iterdir())


def test_transposed_weights_and_fused_experts(text: str, tmp_path: Path) -> None:
    """Train GPT-2, which stores [I, O], and Mixtral; the experts are one tensor in memory and one each on the disk."""
    for family in ("gpt2", "mixtral"):
        config = families()[family].config
        config.vocab_size = 4096
        build(config).save_pretrained(tmp_path / family)
        add_tokenizer(tmp_path / family)
        niwaki.compress(tmp_path / family, tmp_path / f"{family}-cut", method="magnitude", target="0.5", device="cpu")
        for train in ("weights", "low-rank"):
            out = tmp_path / f"{family}-{train}"
            record = recover(tmp_path / f"{family}-cut", out, data=text, train=train, **SMALL | {"seq_len": 24})
            assert record["result"]["heldout_loss"] < record["result"]["heldout_loss_before"]
            old, new = weights_of(tmp_path / f"{family}-cut"), weights_of(out)
            assert old.keys() == new.keys()
            experts = [name for name in old if "experts" in name]
            assert bool(experts) == (family == "mixtral")
            assert all(not new[name][old[name] == 0].any() for name in old if "norm" not in name and "bias" not in name)
            assert all(not torch.equal(old[name], new[name]) for name in experts)


def test_a_model_that_needs_its_first_token_is_told(world: Path, text: str, tmp_path: Path) -> None:
    from support.models import blind_without_bos

    blind_without_bos(tmp_path / "model")
    add_bos(tmp_path / "model", itself=False)
    niwaki.compress(tmp_path / "model", tmp_path / "cut", method="magnitude", target="0.3", device="cpu")
    warned = Warnings()
    with pytest.raises(InputError, match="did not lower"):  # its weights matter little
        recover(tmp_path / "cut", tmp_path / "out", data=text, report=warned, **SMALL)
    assert any("pass --bos on" in message for message in warned.warnings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 128}, "longer than the 64 positions of the model"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"rate": 2.0}, "rate must lie in"),
        ({"train": "all"}, "unknown --train"),
        ({"data": "gone.jsonl"}, "gone.jsonl"),
        ({"data": ()}, "no text to train on"),
        ({"mix": ["self:2"]}, "share in"),
        ({"teacher": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    world: Path, text: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        recover(world / "zeros", tmp_path / "out", **{"data": text, **SMALL, **change})
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_what_cannot_be_recovered_is_refused(world: Path, text: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    with pytest.raises(OutputError, match="not a niwaki result"):
        recover(world / "zeros", tmp_path / "mine", data=text, **SMALL)
    compressed(world / "model", tmp_path / "plain", text, "rtn", "4bit", pack="none")
    with pytest.raises(InputError, match="compress again with --pack codes"):
        recover(tmp_path / "plain", tmp_path / "out", data=text, **SMALL)
    with pytest.raises(InputError, match=r"does not say which dense model .* give the dense model: --teacher"):
        recover(world / "model", tmp_path / "out", data=text, **SMALL)
    model = tiny_llama(tmp_path / "gone")
    compressed(model, tmp_path / "cut", text, "magnitude", "0.5")
    tiny_llama(tmp_path / "gone", blocks=2)
    with pytest.raises(InputError, match="which has changed since then"):
        recover(tmp_path / "cut", tmp_path / "out", data=text, **SMALL)
    shutil.rmtree(model)
    with pytest.raises(InputError, match="which does not exist any more"):
        recover(tmp_path / "cut", tmp_path / "out", data=text, **SMALL)
    other = tiny_llama(tmp_path / "other", vocab_size=4100)
    with pytest.raises(InputError, match="has 4100 tokens, the compressed model 4096"):
        recover(tmp_path / "cut", tmp_path / "out", data=text, teacher=other, **SMALL)
    assert not list(tmp_path.glob("out*"))
