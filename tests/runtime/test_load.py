"""Impossible requests to generate, which are refused before the model is loaded."""

import pytest

import niwaki
from niwaki.errors import InputError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"verify": -1}, "verify must be 0 or more"),
        ({"verify": 4, "temperature": 0.5}, "needs greedy text"),
    ],
)
def test_impossible_settings(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        niwaki.generate("no-such-model", "hello", **arguments)  # type: ignore[arg-type]
