"""Docstrings, comments, messages and pages keep the rules of language that a machine can check."""

from pathlib import Path

import pytest

from house.english import faults, faults_of_docstring, faults_of_words

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "niwaki"
# Folders that are not rewritten yet.
PENDING = {
    "compression", "exporters", "kernels", "measure", "methods",
    "rollout", "runtime", "serve",
}  # fmt: skip
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path.relative_to(SOURCE).parts[0] not in PENDING]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_the_language_of_a_file(path: Path) -> None:
    assert faults(path) == []


def test_the_rules_find_what_they_are_for() -> None:
    import ast

    function = ast.parse("def f(): ...").body[0]
    assert list(faults_of_docstring(function, "Return the sum.")) == []
    for text in ("What the sum is.", "Of both, the sum.", "Returns the sum.", "Return " + "very " * 25 + "much."):
        assert list(faults_of_docstring(function, text)) != []
    assert [number for number, _ in faults_of_words("fine\nall anew\nthe block behind it")] == [2, 3]
    assert list(faults_of_words("two servers behind a gateway")) == []
