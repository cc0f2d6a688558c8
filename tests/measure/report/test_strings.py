"""The languages of a report hold the same texts, all of them used."""

import re
from pathlib import Path
from string import Formatter

import pytest

import niwaki.measure.report.page
from niwaki.errors import InputError
from niwaki.measure.report.strings import LANGUAGES, check_language, date, strings

FOLDER = Path(niwaki.measure.report.page.__file__).parent
PARTS = ("metric_", "units_of_", "kind_", "measure_", "set_", "axis_")  # completed by a name of the schema


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name}


def test_languages_have_the_same_keys_and_the_same_fields() -> None:
    english = LANGUAGES["en"]
    for language, texts in LANGUAGES.items():
        assert list(texts) == list(english), language
        different = {key for key in english if key != "date" and fields(texts[key]) != fields(english[key])}
        assert not different, (language, different)
        assert all(texts.values())


def test_every_key_is_used_and_every_used_key_is_there() -> None:
    templates = "".join(path.read_text() for path in (FOLDER / "templates").glob("*.j2"))
    code = "".join(path.read_text() for path in FOLDER.glob("*.py") if path.stem not in ("english", "japanese"))
    used = set(re.findall(r"\bt\.(\w+)", templates)) - {"get", "format"}
    assert used <= set(LANGUAGES["en"])
    quoted = set(re.findall(r"[\"'](\w+)[\"']", code))
    unused = {key for key in LANGUAGES["en"] if key not in used | quoted and not key.startswith(PARTS)}
    assert not unused


def test_no_key_is_the_name_of_a_method_of_dictionaries() -> None:
    """A template would find the method instead of the text."""
    assert not [key for key in LANGUAGES["en"] if hasattr({}, key)]


def test_names_of_the_schema_have_texts() -> None:
    from niwaki.measure.metrics import METRICS
    from niwaki.measure.schema import ComparisonSettings, Kind, SampleUnit

    wanted = {f"metric_{name}" for name in METRICS} | {f"set_{name}" for name in ComparisonSettings.model_fields}
    wanted |= {f"units_of_{name}" for name in SampleUnit.__args__} | {f"kind_{name}" for name in Kind.__args__}
    for texts in LANGUAGES.values():
        assert wanted <= set(texts)


def test_japanese_is_japanese() -> None:
    same = {key for key, text in LANGUAGES["ja"].items() if text == LANGUAGES["en"][key]}
    assert same <= {"times_alone", "plot_value", "env_accelerator"}
    assert not [
        key for key, text in LANGUAGES["ja"].items() if re.search(r"[ぁ-んァ-ヶ一-龠][,.;:]|[ぁ-ん] [ぁ-ん]", text)
    ]


def test_an_unknown_language_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match=r"jp.*ja"):
        check_language("jp")


def test_dates_are_utc() -> None:
    assert date(strings("en"), "2026-11-22T23:30:00+02:00") == "22 November 2026, 21:30 UTC"
    assert date(strings("ja"), "2026-11-02T23:30:00+02:00") == "2026年11月2日 21:30（UTC）"
