"""One server for all tests that leave it as it was."""

from collections.abc import Iterator

import pytest

from serving_helpers import Running, chat_model, running


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(chat_model(tmp_path_factory.mktemp("serving") / "model"), slots=4, queue=8) as server:
        yield server
