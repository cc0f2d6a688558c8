"""Model and text of the tests of a compression."""

from pathlib import Path

import pytest

from support.models import tiny_llama, write_texts


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a random Llama of four blocks."""
    return tiny_llama(tmp_path / "model", blocks=4)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Return a file of texts."""
    return write_texts(tmp_path / "text.jsonl")
