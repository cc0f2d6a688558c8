"""Real `niwaki serve` of the sapling for the system tests of serving: its process, its port, its memory."""

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import psutil

from niwaki.cli.demo import sapling

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def sapling_with_template(folder: Path, template: str = TEMPLATE) -> Path:
    """Copy the sapling and give it a chat template."""
    shutil.copytree(sapling(), folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@contextmanager
def serving(
    model: Path,
    port: int,
    *options: str,
    log: IO[str] | None = None,
    command: Sequence[str] = (sys.executable, "-m", "niwaki.cli"),
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `niwaki serve` on `model` until the block ends, and yield it once it is ready. Its log goes to `log`."""
    given = ["serve", str(model), "--port", str(port), "--device", "cpu", *options]
    process = subprocess.Popen([*command, *given], stderr=log or subprocess.DEVNULL, env=environment)
    try:
        until = time.monotonic() + 600
        while not _ready(port):
            if time.monotonic() > until or process.poll() is not None:
                raise RuntimeError("the server did not start")
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


@contextmanager
def served_sapling(port: int, name: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `niwaki serve` on the sapling with a chat template, and yield it once it is ready."""
    with tempfile.TemporaryDirectory() as temporary:
        model = sapling_with_template(Path(temporary) / name)
        with serving(model, port, "--name", name, *options) as process:
            yield process


def resident(process: psutil.Process) -> int:
    """Return the resident bytes of a process and its children."""
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))


def computed(process: psutil.Process) -> float:
    """Return the seconds of CPU of a process and its children."""
    return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True)))


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def metrics_of(port: int, key: str = "none") -> dict[str, float]:
    """Return the series of /metrics and their values."""
    headers = {"Authorization": f"Bearer {key}"}
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", headers=headers, timeout=30).text
    rows = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in rows}


@dataclass
class Reply:
    """Reply on a connection of its own, and the seconds since the connection opened."""

    raw: bytes
    seconds: float

    @property
    def status(self) -> int:
        """Return the status of HTTP, 0 if the connection was closed without one."""
        return int(self.raw[9:12]) if self.raw.startswith(b"HTTP/1.1 ") else 0

    @property
    def headers(self) -> str:
        """Return the headers in lower case."""
        return self.raw.partition(b"\r\n\r\n")[0].decode("latin-1").lower()

    @property
    def json(self) -> Any:
        """Return the JSON of an answer that is not a stream."""
        return json.loads(self.raw.partition(b"\r\n\r\n")[2])

    @property
    def events(self) -> list[Any]:
        """Return the events of a stream, without its last line."""
        return _events(self.raw)

    @property
    def text(self) -> str:
        """Return the text of a stream of /v1/completions."""
        return "".join(choice["text"] for event in self.events for choice in event.get("choices", ()))


class Call:
    """Request on a connection of its own, which can be cut."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, began: float) -> None:
        self.reader, self.writer, self.began, self.raw = reader, writer, began, b""

    @classmethod
    async def send(cls, port: int, sent: bytes) -> "Call":
        """Open the connection and send."""
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        return cls(reader, writer, began)

    async def until(self, events: int) -> None:
        """Read until `events` events of a stream are there."""
        while len(_events(self.raw)) < events:
            if not (part := await self.reader.read(65536)):
                raise EOFError(self.raw[:300])
            self.raw += part

    async def rest(self) -> Reply:
        """Read until the server closes, and return the reply."""
        try:
            while part := await self.reader.read(65536):
                self.raw += part
        except ConnectionResetError:
            pass  # refused before all was sent
        self.writer.close()
        return Reply(self.raw, time.monotonic() - self.began)

    def cut(self) -> None:
        """Close the connection at once, as a client that goes away."""
        self.writer.transport.abort()


def written(path: str, body: Any, headers: Mapping[str, str] | None = None, method: str = "POST") -> bytes:
    """Return the bytes of a request."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    usual = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(content))}
    lines = [f"{name}: {value}" for name, value in {**usual, "Connection": "close", **(headers or {})}.items()]
    return f"{method} {path} HTTP/1.1\r\n".encode() + "\r\n".join(lines).encode() + b"\r\n\r\n" + content


async def ask(port: int, path: str, body: Any, headers: Mapping[str, str] | None = None, method: str = "POST") -> Reply:
    """Send a request and return its reply."""
    return await (await Call.send(port, written(path, body, headers, method))).rest()


def _events(raw: bytes) -> list[Any]:
    lines = raw.replace(b"\r\n", b"\n").split(b"\n")
    return [json.loads(line[6:]) for line in lines if line.startswith(b"data: {") and line.endswith(b"}")]
