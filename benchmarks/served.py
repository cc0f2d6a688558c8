"""A real `niwaki serve` of the sapling for the benchmarks of serving: its process, its port, its memory."""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx2
import psutil

from niwaki.demo import sapling

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def sapling_with_template(folder: Path, template: str = TEMPLATE) -> Path:
    """A copy of the sapling that can chat."""
    shutil.copytree(sapling(), folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@contextmanager
def serving(
    model: Path, port: int, *options: str, log: IO[str] | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """`niwaki serve` on `model`, ready; what it logs goes to `log`, if given. It is ended at last, if it still runs."""
    command = [sys.executable, "-m", "niwaki.cli", "serve", str(model), "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen([*command, *options], stderr=log or subprocess.DEVNULL, env=environment)
    try:
        until = time.monotonic() + 120
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
    """`niwaki serve` on the sapling with a chat template, ready."""
    with tempfile.TemporaryDirectory() as temporary:
        model = sapling_with_template(Path(temporary) / name)
        with serving(model, port, "--name", name, *options) as process:
            yield process


def resident(process: psutil.Process) -> int:
    """Bytes of a process and its children."""
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))


def computed(process: psutil.Process) -> float:
    """Seconds of CPU that a process and its children have used."""
    return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True)))


def _ready(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False
