"""Rendering of a dialogue with the chat template of the model, in a process that can be killed.

A template is a program that comes with a model, so it is not trusted. transformers renders it in the immutable sandbox
of Jinja. The sandbox has no access to files or to Python, but a template can still loop forever or fill the memory.
Therefore it runs in its own process. The system enforces the limits: `CPU_S`, `MEMORY_BYTES`, and `MAX_BYTES` of text.
Neither a request nor a row of text can bring a template.

    renderer = Renderer(template, {"bos_token": "<s>"})
    text = renderer.render([{"role": "user", "content": "Hello"}])
"""

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, Any

from niwaki.errors import InputError

CPU_S = 0.08  # a refusal comes within 0.1 s
COMPILE_S = 1.0  # once, before the first dialogue
WALL_S = 10.0  # for CPU_S on a busy machine
START_S = 60.0
MEMORY_BYTES = 2**30
MAX_BYTES = 1_000_000  # in UTF-8


class DialogueRefusedError(InputError):
    """The template refuses a dialogue, or makes too much text of it."""


class TemplateLimitError(InputError):
    """The template took more time or memory than its limits."""


class RendererStartError(InputError):
    """The process that renders does not start."""


class Renderer:
    """Process that renders. It starts again after a template was killed.

    With `asks` the text ends where the answer of the model begins; without it, after the last message.
    """

    def __init__(self, template: str, names: dict[str, str], *, asks: bool = True) -> None:
        self._setup = {"template": template, "names": names, "asks": asks}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start()
        except RendererStartError as error:
            raise InputError(f"{error}: is the model's chat template sound?") from error

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """Return the text. Raises DialogueRefusedError, TemplateLimitError or RendererStartError."""
        with self._lock:
            process = self._process if self._process is not None else self._start()
            assert process.stdin is not None and process.stdout is not None
            try:
                _send(process.stdin, list(messages))
                answer = json.loads(_line(process.stdout, WALL_S))
            except (OSError, TimeoutError, EOFError) as error:
                self._stop()
                limits = f"{CPU_S:g} s, {MEMORY_BYTES / 2**20:.0f} MiB"
                raise TemplateLimitError(f"the chat template exceeded its limits ({limits}): send less") from error
        if "refused" in answer:
            raise DialogueRefusedError(f"the chat template cannot render this dialogue: {answer['refused']}")
        return str(answer["text"])

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            _send(process.stdin, self._setup)
            _line(process.stdout, START_S)
        except (OSError, TimeoutError, EOFError) as error:
            process.kill()
            process.wait()
            raise RendererStartError("the process that renders chat templates does not start") from error
        self._process = process
        return process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _send(stream: IO[bytes], value: Any) -> None:
    stream.write(json.dumps(value).encode() + b"\n")
    stream.flush()


def _line(stream: IO[bytes], limit_s: float) -> bytes:
    """Read one line. Raise TimeoutError after `limit_s`, or EOFError if the process ended."""
    until, line = time.monotonic() + limit_s, bytearray()
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], max(until - time.monotonic(), 0))
        if not ready:
            raise TimeoutError
        if not (part := os.read(stream.fileno(), 2**16)):
            raise EOFError
        line += part
    return bytes(line)


def _serve() -> None:
    """Run the program of the process: read the setup, then one dialogue per line, and print one answer per line."""
    import resource
    import signal

    from transformers.utils.chat_template_utils import render_jinja_template

    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server handles Ctrl-C
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process in any state
    shared: dict[str, Any] | None = None
    for line in sys.stdin.buffer:
        value = json.loads(line)
        first, shared = shared is None, shared or value
        signal.setitimer(signal.ITIMER_PROF, COMPILE_S if first else CPU_S)
        answer = _render(render_jinja_template, shared, [] if first else value)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


def _render(render_jinja_template: Any, shared: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, str]:
    try:
        texts, _ = render_jinja_template(
            [messages], chat_template=shared["template"], add_generation_prompt=shared["asks"], **shared["names"]
        )
    except MemoryError:
        return {"refused": "it takes too much memory"}
    except Exception as error:  # an error of the template is its answer
        return {"refused": str(error)[:200] or type(error).__name__}
    size = len(texts[0].encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        return {"refused": f"it becomes {size:,} bytes, the max is {MAX_BYTES:,}"}
    return {"text": texts[0]}


if __name__ == "__main__":
    _serve()
