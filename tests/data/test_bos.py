"""Every window and every text begins as the tokenizer says, once, and only where it says so."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from niwaki.data.bos import Bos, find_bos
from niwaki.data.texts import calibration_windows, evaluation_windows, load_tokenizer, owned_windows, sampled_windows
from niwaki.errors import CalibrationError
from niwaki.measure.evaluate.tasks import Item, buckets
from niwaki.runtime.load import generate
from niwaki.serve.prompts import PromptTokenizer
from support.models import add_bos, blind_without_bos, tiny_llama

TEXTS = [f"document number {i} says hello to the garden" for i in range(40)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model", blocks=1, vocab_size=4160)


def rename(folder: Path, model_type: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))


def without_bos(folder: Path) -> list[int]:
    path = folder / "tokenizer_config.json"
    described = json.loads(path.read_text())
    described.pop("bos_token")
    path.write_text(json.dumps(described))
    return []


SETTERS: dict[str, tuple[Callable[[Path], list[int]], str, str]] = {
    "puts it itself": (add_bos, "on", "on"),
    "names it only": (lambda folder: add_bos(folder, itself=False), "off", "on"),
    "puts two tokens, names none": (lambda f: add_bos(f, tokens=("[gMASK]", "<sop>"), named=False), "on", "on"),
    "has none": (without_bos, "off", "error"),
}


@pytest.mark.parametrize("kind", SETTERS)
def test_the_policies_follow_the_tokenizer(kind: str, folder: Path) -> None:
    make, auto, on = SETTERS[kind]
    ids = tuple(make(folder))
    tokenizer = load_tokenizer(folder)
    assert find_bos(tokenizer).ids == (ids if auto == "on" else ())
    off = find_bos(tokenizer, "off")
    assert (off.ids, off.unused, off.state) == ((), ids, "off")
    if on == "error":
        with pytest.raises(CalibrationError, match=r"has no beginning-of-text token: set bos_token in its"):
            find_bos(tokenizer, "on")
        return
    found = find_bos(tokenizer, "on")
    assert (found.ids, found.unused, found.state) == (ids, (), "on")
    windows = evaluation_windows(TEXTS, tokenizer, seq_len=12, max_tokens=120, bos="on")
    assert windows.shape == (10, 12)
    assert windows[:, : len(ids)].tolist() == [list(ids)] * 10
    rest = evaluation_windows(TEXTS, tokenizer, seq_len=12 - len(ids), max_tokens=10 * (12 - len(ids)), bos="off")
    assert torch.equal(windows[:, len(ids) :], rest), "the same text, cut into shorter pieces"


def test_an_unknown_policy_is_refused(folder: Path) -> None:
    with pytest.raises(CalibrationError, match="bos policy 'atuo'"):
        find_bos(load_tokenizer(folder), "atuo")  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "recurrent_gemma"])
def test_a_gemma_always_begins_with_its_token(folder: Path, model_type: str) -> None:
    (bos,) = add_bos(folder, itself=False)
    rename(folder, model_type)
    tokenizer = load_tokenizer(folder)
    assert tokenizer("x")["input_ids"][0] != bos, "the tokenizer alone does not"
    assert find_bos(tokenizer).ids == (bos,)
    assert find_bos(tokenizer, "off").ids == ()


def test_without_a_token_nothing_changes(folder: Path) -> None:
    """A tokenizer that names a token and does not put it gives the windows that it always gave."""
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_token_id is not None and not find_bos(tokenizer).ids
    stream = [token for text in TEXTS for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    windows = evaluation_windows(TEXTS, tokenizer, seq_len=12)
    assert windows.flatten().tolist() == stream[: len(stream) // 12 * 12]


def test_all_kinds_of_windows_begin_with_it(folder: Path) -> None:
    (bos,) = add_bos(folder)
    tokenizer = load_tokenizer(folder)
    calibration = calibration_windows(TEXTS, tokenizer, samples=6, seq_len=16, seed=0)
    sampled = sampled_windows(folder, samples=3, seq_len=8, seed=0, device="cpu")
    evaluation, owners = owned_windows(TEXTS, tokenizer, seq_len=16)
    for windows, shape in ((calibration, (6, 16)), (sampled, (3, 8)), (evaluation, (len(evaluation), 16))):
        assert windows.shape == shape
        assert (windows == bos).sum(1).tolist() == [1] * len(windows) and (windows[:, 0] == bos).all()
    assert torch.equal(owners[:, 0], owners[:, 1]), "the token belongs to the document of the next one"
    assert len(set(owners.flatten().tolist())) > 5
    again = sampled_windows(folder, samples=3, seq_len=8, seed=0, device="cpu", bos="off")
    assert again.shape == (3, 8) and not (again[:, 0] == bos).all()


def test_a_text_that_holds_it_gets_no_other(folder: Path) -> None:
    """Chat templates write the token themselves."""
    (bos,) = add_bos(folder)
    tokenizer = load_tokenizer(folder)
    plain = calibration_windows(TEXTS, tokenizer, samples=6, seq_len=16, seed=0)
    rendered = [f"<bos>{text}" for text in TEXTS]
    assert torch.equal(calibration_windows(rendered, tokenizer, samples=6, seq_len=16, seed=0), plain)
    assert (calibration_windows(rendered, tokenizer, samples=6, seq_len=16, seed=0, bos="off") == bos).any()
    one = find_bos(tokenizer)
    assert one.encode(tokenizer, "<bos>hello") == one.encode(tokenizer, "hello") == tokenizer("hello")["input_ids"]
    prompts = PromptTokenizer(tokenizer, vocabulary=4160, context=64)
    assert prompts.tokenize_text("<bos>hello") == prompts.tokenize_text("hello") == tokenizer("hello")["input_ids"]
    assert prompts.tokenize_text([5, 6]) == [5, 6]


@pytest.mark.parametrize("context", ["The garden", "<bos>The garden", "  ", ""])
def test_a_question_begins_with_it_once(folder: Path, context: str) -> None:
    (bos,) = add_bos(folder)
    tokenizer = load_tokenizer(folder)
    item = Item(((context, " is green."), (context, " is wide.")), 0)
    (bucket, *_) = buckets([item], tokenizer, None, 2048, find_bos(tokenizer))
    assert bucket.ids_ST[0].tolist().count(bos) == 1 and bucket.ids_ST[0, 0] == bos
    (bucket, *_) = buckets([item], tokenizer, None, 2048, Bos())
    assert (bos in bucket.ids_ST[0]) == (not context or "<bos>" in context), "off: only where the text has it"


def test_a_window_must_have_room_for_text(folder: Path) -> None:
    add_bos(folder, tokens=("[gMASK]", "<sop>"), named=False)
    tokenizer = load_tokenizer(folder)
    with pytest.raises(CalibrationError, match=r"seq_len 2: a window begins with \[gMASK\]<sop> and holds no text"):
        evaluation_windows(TEXTS, tokenizer, seq_len=2)
    assert evaluation_windows(TEXTS, tokenizer, seq_len=3).shape[1] == 3
    with pytest.raises(CalibrationError, match="evaluation text holds 3 tokens, one window needs 10"):
        evaluation_windows(TEXTS, tokenizer, seq_len=12, max_tokens=5)


def test_generated_text_begins_with_it(tmp_path: Path) -> None:
    """The greedy text of a model that is blind without the token differs from that without it."""
    blind_without_bos(tmp_path / "model")
    add_bos(tmp_path / "model", itself=False)
    without = generate(tmp_path / "model", "Hello", max_new_tokens=3, device="cpu")
    add_bos(tmp_path / "model")
    assert generate(tmp_path / "model", "Hello", max_new_tokens=3, device="cpu") != without


def test_a_model_without_a_tokenizer_samples_as_before(folder: Path) -> None:
    before = sampled_windows(folder, samples=2, seq_len=8, seed=0, device="cpu")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert torch.equal(sampled_windows(folder, samples=2, seq_len=8, seed=0, device="cpu"), before)
    with pytest.raises(CalibrationError, match="no usable tokenizer"):
        sampled_windows(folder, samples=2, seq_len=8, seed=0, device="cpu", bos="on")
