"""A server on loopback in this process, and the official client that talks to it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from niwaki.serve.server import Server, ServerSettings, make_service
from support.models import tiny_llama

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_model(folder: Path, **changes: Any) -> Path:
    """Return a tiny Llama with a chat template. Its end token is one that it almost never generates."""
    tiny_llama(folder, **{"max_position_embeddings": 256, "eos_token_id": 4095, **changes})
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


class Running:
    """Running server with its address, and clients for it."""

    def __init__(self, server: Server) -> None:
        self.server, self.service = server, server.service
        port = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.port = port

    def client(self, key: str = "none", **settings: Any) -> OpenAI:
        """Return the official client, without retries."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 60, **settings})

    def http(self, **settings: Any) -> httpx.Client:
        """Return a plain HTTP client."""
        return httpx.Client(base_url=self.url, timeout=60, **settings)

    def metric(self, line: str) -> float:
        """Return the value of a series, 0 before the first count."""
        found = [row for row in self.service.metrics.text().decode().splitlines() if row.startswith(line + " ")]
        return float(found[0].rpartition(" ")[2]) if found else 0.0


@contextmanager
def running(model: Path, **settings: Any) -> Iterator[Running]:
    """Serve `model` on a free port until the block ends."""
    given = ServerSettings(**{"port": 0, "device": "cpu", "name": "tiny", **settings})
    server = Server(make_service(model, given), given)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Running(server)
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


def until(happened: Callable[[], object], seconds: float = 20) -> None:
    """Wait for the work of another thread."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
