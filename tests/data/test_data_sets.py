"""Named data sets are loaded at their commits; without a network or with a slip the refusal is one line."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest

from niwaki.cli.demo import sapling
from niwaki.data.data_sets import NAMED, DataSet
from niwaki.data.documents import Documents
from niwaki.data.texts import load_tokenizer, read_calibration, read_evaluation
from niwaki.errors import CalibrationError

LINES = ["", " = First = \n", "", " body one \n", " = = Part = = \n", " more \n", " = Second = \n", " body two \n"]


class Hub:
    """The hub: remembers what was asked for, and gives `rows`."""

    def __init__(self, rows: list[dict[str, Any]], known_bytes: int | None = None) -> None:
        self.rows, self.known_bytes, self.calls = rows, known_bytes, []  # type: ignore[var-annotated]

    def load(self, hub_id: str, /, **given: Any) -> Any:
        self.calls.append((hub_id, given))
        found = datasets.Dataset.from_list(self.rows).to_iterable_dataset()
        if self.known_bytes is not None:
            found.info.splits = {given["split"]: SimpleNamespace(num_bytes=self.known_bytes)}
        return found


def stub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], **known: Any) -> Hub:
    hub = Hub(rows, **known)
    monkeypatch.setattr(datasets, "load_dataset", hub.load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha="newest"))
    return hub


def test_every_name_has_a_commit() -> None:
    for name, about in NAMED.items():
        assert about.hub_id.count("/") == 1 and len(about.revision or "") == 40, name
        assert set(about.revision or "") <= set("0123456789abcdef")


@pytest.mark.parametrize(
    ("source", "held_out", "name", "given"),
    [
        ("c4", False, "allenai/c4", {"name": "en", "split": "train"}),
        ("c4", True, "allenai/c4", {"name": "en", "split": "validation"}),
        ("ultrachat", True, "HuggingFaceH4/ultrachat_200k", {"split": "test_sft"}),
        ("fineweb-edu", True, "HuggingFaceFW/fineweb-edu", {"name": "sample-10BT", "split": "train"}),
        ("c4:some@abc", True, "allenai/c4", {"name": "en", "split": "some", "revision": "abc"}),
        ("org/own", True, "org/own", {"split": "train", "revision": "newest"}),
        ("org/own:dev@abc", False, "org/own", {"split": "dev", "revision": "abc"}),
    ],
)
def test_a_source_names_set_split_and_commit(
    monkeypatch: pytest.MonkeyPatch, source: str, held_out: bool, name: str, given: dict[str, Any]
) -> None:
    hub = stub(monkeypatch, [{"text": "hello"}])
    short = source.partition(":")[0]
    wanted = {"revision": NAMED[short].revision, **given} if short in NAMED else given
    next(iter(DataSet(source, held_out).rows()))
    assert hub.calls == [(name, {"streaming": True, **wanted})]


def test_articles_of_wikitext_are_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, [{"text": line} for line in LINES])
    documents = Documents(["wikitext"], held_out=True)
    articles = ["".join(LINES[:6]), "".join(LINES[6:])]
    assert [document.text for document in documents] == articles
    assert sorted(document.text for document in documents.shuffled(0)) == sorted(articles)
    assert documents.revisions == {"wikitext": NAMED["wikitext"].revision}


def test_dialogues_of_ultrachat_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, [{"prompt": "x", "messages": [{"role": "user", "content": "hello"}]}])
    with pytest.raises(CalibrationError, match="the model has no chat template"):
        list(Documents(["ultrachat"], tokenizer=load_tokenizer(sapling())))


def test_windows_record_the_commit_and_take_only_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [{"text": f"document {number} says hello"} for number in range(3000)]
    stub(monkeypatch, [{"text": None}, *rows])
    told: list[str] = []

    def report(event: str, **fields: Any) -> None:
        told.append(f"{event}: {fields['message']}")

    size: dict[str, Any] = {"seq_len": 16, "bos": "off", "report": report}
    tokenizer = load_tokenizer(sapling())
    one, same, other = (
        read_calibration(["org/own"], "text", tokenizer, samples=4, seed=seed, **size) for seed in (0, 0, 1)
    )
    assert (one.ids_ST == same.ids_ST).all() and not (one.ids_ST == other.ids_ST).all()
    assert one.about == {"bos": "off", "revisions": {"org/own": "newest"}}
    read = read_evaluation(["org/own"], "text", tokenizer, max_tokens=64, **size)
    assert read.revision == "newest" and read.skipped == {"null in 'text'": 1}
    assert told == ["warning: org/own: skipped 1 of 10 rows: 1 null in 'text' (first: row 1)"]


def test_a_small_data_set_keeps_the_order_of_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"text": f"{number}"} for number in range(50)]
    stub(monkeypatch, rows, known_bytes=1000)
    (tmp_path / "same.jsonl").write_text("".join(f'{{"text": "{number}"}}\n' for number in range(50)))
    order = [[one.text for one in Documents([source]).shuffled(3)] for source in ("a/b", str(tmp_path / "same.jsonl"))]
    assert order[0] == order[1] != [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("c4", r"the data set c4 \(allenai/c4\) could not be fetched \(no network\): it needs a network once"),
        ("wikitxt", r"neither a .* file nor a loadable data set \(no network\): did you mean wikitext\?"),
        ("org/own", r"org/own is neither a .* file nor a loadable data set \(no network\)$"),
        ("c4:a:b", "expected NAME, NAME:SPLIT or NAME:SPLIT@REVISION"),
    ],
)
def test_without_a_network_the_refusal_is_one_line(monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nsecond line")

    stub(monkeypatch, [])
    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(CalibrationError, match=message) as refused:
        list(Documents([source]))
    assert "\n" not in str(refused.value)


def test_a_network_that_fails_later_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        info = SimpleNamespace(splits=None)

        def __iter__(self) -> Any:
            yield {"text": "first"}
            raise OSError("connection lost")

    hub = stub(monkeypatch, [])
    monkeypatch.setattr(hub, "load", lambda *_, **__: Failing())
    monkeypatch.setattr(datasets, "load_dataset", hub.load)
    with pytest.raises(CalibrationError, match="could not be fetched \\(connection lost\\)"):
        list(Documents(["fineweb-edu"]))
