"""Language of docstrings, comments, messages and pages, as far as a machine can check it."""

import re
from pathlib import Path

import pytest

from house.english import faults, faults_of_docstring, faults_of_words

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "niwaki"
SCRIPTS = (ROOT / "benchmarks", ROOT / "tests" / "system" / "serving")
FILES = [path for folder in (SOURCE, *SCRIPTS) for path in sorted(folder.rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_language_of_a_file(path: Path) -> None:
    assert faults(path) == []


PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "tests" / "system" / "serving" / "README.md",
]
# Their source is the code, whose language is checked there.
GENERATED = re.compile(r"<!-- generated: .*?<!-- end -->", re.S)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_words_of_a_page(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.name == "glossary.md":
        text = text.partition("## Words we do not use")[0]
    text = GENERATED.sub(lambda found: "\n" * found[0].count("\n"), text)
    assert list(faults_of_words(text)) == []


def test_the_rules_find_what_they_are_for() -> None:
    import ast

    function = ast.parse("def f(): ...").body[0]
    assert list(faults_of_docstring(function, "Return the sum.")) == []
    for text in ("What the sum is.", "Of both, the sum.", "Returns the sum.", "Return " + "very " * 25 + "much."):
        assert list(faults_of_docstring(function, text)) != []
    assert [number for number, _ in faults_of_words("fine\nall anew\nthe block behind it")] == [2, 3]
    assert list(faults_of_words("two servers behind a gateway")) == []
    assert [number for number, _ in faults_of_words("x is no text file\nthere is no file\nit is no longer there")] == [
        1
    ]
