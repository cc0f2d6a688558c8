"""Tests 17, 18, 22 and 23: bodies and headers that are too large or too slow, long prompts, keys, templates."""

import asyncio
import gzip
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil

from niwaki.cli.demo import sapling
from niwaki.data.texts import load_tokenizer
from niwaki.serve.app import Service, create_app
from niwaki.serve.http.keys import Keys
from niwaki.serve.http.limits import KEYLESS_PATHS
from tests.system.serving.served import (
    TEMPLATE,
    Call,
    Reply,
    ask,
    free_port,
    resident,
    sapling_with_template,
    served_sapling,
    serving,
    written,
)

NAME, PATH, CHAT = "tiny", "/v1/completions", "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": NAME, "prompt": "Hello", "max_tokens": 1}
KEY, WRONG = "sk-reach-0123456789abcdef", "sk-someone-elses-key"
BOMBS = (
    """
{%- set told, many = messages[0].content, 8 -%}
{%- if told == 'loop' -%}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{%- elif told == 'one long step' -%}{{ 10 ** (10 ** many) }}
{%- elif told == 'memory' -%}{{ ('x' * 10 ** (many + 2)) | length }}
{%- elif told == 'output' -%}{% for a in range(2000) %}{{ 'x' * 1000 }}{% endfor %}
{%- elif told == 'bytes' -%}{% for a in range(400) %}{{ '庭' * 1000 }}{% endfor %}
{%- elif told == 'classes' -%}{{ ''.__class__.__mro__[1].__subclasses__() }}
{%- elif told == 'globals' -%}{{ cycler.__init__.__globals__.os.popen('id').read() }}
{%- elif told == 'format' -%}{{ '{0.__class__}'.format(messages) }}
{%- elif told == 'include' -%}{% include '/etc/passwd' %}
{%- else -%}"""
    + TEMPLATE
    + "{%- endif -%}"
)
Row = dict[str, Any]


def too_large_and_too_slow(at_once: int = 20, slow: int = 50) -> Row:
    """Run test 17: bad requests of all kinds at once, while an honest client gets answers."""
    port, large = free_port(), b'"' + b"x" * 3_000_000 + b'"'
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (large[: 2**20], large[2**20 :])) + b"0\r\n\r\n"
    in_chunks = written(PATH, b"", {"Transfer-Encoding": "chunked"}).replace(b"Content-Length: 0\r\n", b"") + pieces
    bomb = gzip.compress(bytes(10**9), 9)
    half = written(PATH, b"").replace(b"Content-Length: 0", b"Content-Length: 90")
    kinds: dict[str, tuple[int, Callable[[], Any]]] = {
        "3 MB": (413, lambda: ask(port, PATH, large)),
        "3 MB in chunks": (413, lambda: _sent(port, in_chunks)),
        "1 GB of zeros, gzip": (415, lambda: ask(port, PATH, bomb, {"Content-Encoding": "gzip"})),
        "header of 1 MB": (431, lambda: ask(port, PATH, HELLO, {"X-Long": "x" * 10**6})),
        "a byte of header a second": (408, lambda: _dripped(port, b"GET /health HTTP/1.1\r\nX-Slow: ", 1.0)),
        "a byte of body in 3 s": (408, lambda: _dripped(port, half, 3.0)),
    }

    async def all_of_them() -> tuple[dict[str, Counter[int]], list[float]]:
        found = {name: Counter[int]() for name in kinds}
        honest: list[float] = []

        async def one(name: str) -> None:
            found[name][(await kinds[name][1]()).status] += 1

        async def other() -> None:
            until = time.monotonic() + 25
            while time.monotonic() < until:
                reply = await ask(port, PATH, HELLO)
                honest.append(reply.seconds if reply.status == 200 else float("inf"))
                await asyncio.sleep(0.2)

        many = [one(name) for name in kinds for _ in range(slow if name.startswith("a byte") else at_once)]
        await asyncio.gather(other(), *many)
        return found, honest

    with served_sapling(port, NAME, "--dtype", "float32") as process:
        asyncio.run(_several(20, lambda: ask(port, PATH, HELLO)))
        with Memory(process.pid) as memory:
            found, honest = asyncio.run(all_of_them())
    # With more than 32 MiB of unfinished bodies, the next one gets 503.
    allowed = {name: {status} | ({503} if "chunks" in name else set()) for name, (status, _) in kinds.items()}
    expected = {name: set(found[name]) <= allowed[name] for name in kinds}
    return {
        "what": f"{at_once} of each kind, {slow} that are slow, all at once",
        "reached": f"{sum(sum(counts.values()) for counts in found.values())} bad requests at once, "
        f"{sum(expected.values())} of {len(kinds)} kinds with their status, memory {memory.growth_mb:+.1f} MB, "
        f"{len(honest)} honest requests answered within {max(honest):.2f} s; gzip gets 415",
        "figure": {
            "statuses": {name: dict(counts) for name, counts in found.items()},
            "rss_growth_mb": round(memory.growth_mb, 1), "honest_requests": len(honest),
            "honest_slowest_s": round(max(honest), 3),
        },
        "passed": all(expected.values()) and memory.growth_mb <= 50 and max(honest) < float("inf"),
    }  # fmt: skip


def beyond_context(count: int = 50) -> Row:
    """Run test 18: prompts by ids, which need no tokenizer, and by text, minus the time of the tokenizer."""
    port, tokenizer = free_port(), load_tokenizer(sapling())
    ids = {**HELLO, "prompt": [5] * 1025}
    text = "garden " * 100_000

    with served_sapling(port, NAME, "--dtype", "float32"):
        replies = asyncio.run(_several(count, lambda: ask(port, PATH, ids)))
        long = asyncio.run(_several(5, lambda: ask(port, PATH, {**HELLO, "prompt": text})))
    tokenizing = []
    for _ in range(5):
        began = time.perf_counter()
        tokenizer(text)["input_ids"]
        tokenizing.append(time.perf_counter() - began)
    slowest_ms = max(reply.seconds for reply in replies) * 1000
    beside_ms = (statistics.median(reply.seconds for reply in long) - statistics.median(tokenizing)) * 1000
    named = all(reply.status == 400 and "1024" in reply.json["error"]["message"] for reply in [*replies, *long])
    return {
        "what": f"prompts beyond the context: {count} of 1025 ids, 5 of 700 kB of text",
        "reached": f"{len(replies) + len(long)} × 400{' naming the limit' if named else ''}: by ids within "
        f"{slowest_ms:.1f} ms, texts {beside_ms:.1f} ms beside tokenizing",
        "figure": {
            "all_name_the_limit": named, "ids_slowest_ms": round(slowest_ms, 1),
            "text_median_ms": round(statistics.median(reply.seconds for reply in long) * 1000, 1),
            "tokenizing_median_ms": round(statistics.median(tokenizing) * 1000, 1),
            "text_beside_tokenizing_ms": round(beside_ms, 1),
        },
        "passed": named and slowest_ms <= 50 and beside_ms <= 50,
    }  # fmt: skip


def keys() -> Row:
    """Run test 22: every route of the application with no key, a wrong one and the right one, then the log."""
    told = SimpleNamespace(engine=None, name=NAME, created=0)
    routes = [
        (method, route.path.replace("{name:path}", NAME))
        for route in cast(Any, create_app(cast(Service, told)).routes)
        for method in sorted(route.methods)
    ]
    wrong = ({}, {"Authorization": f"Bearer {WRONG}"}, {"Authorization": f"Basic {KEY}"}, {"X-Api-Key": KEY})

    async def all_routes(port: int) -> dict[str, list[int]]:
        found = {}
        for method, path in routes:
            body = HELLO if method == "POST" else b""
            statuses = [(await ask(port, path, body, headers, method)).status for headers in wrong]
            right = await ask(port, path, body, {"Authorization": f"Bearer {KEY}"}, method)
            found[f"{method} {path}"] = [*statuses, right.status]
        return found

    port = free_port()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "keys").write_text(f"{KEY}\nanother\n", encoding="utf-8")
        model, log = sapling_with_template(folder / NAME), folder / "log"
        script = [sys.executable, "-m", "tests.system.serving.served_slowly"]
        environment = {**os.environ, "REACH_LOG": "1"}
        given = ("--name", NAME, "--api-key-file", str(folder / "keys"), "--dtype", "float32")
        with log.open("w") as file, serving(model, port, *given, log=file, command=script, environment=environment):
            found = asyncio.run(all_routes(port))
        lines = log.read_text(encoding="utf-8")
    closed = {name: codes for name, codes in found.items() if name.split()[1] not in KEYLESS_PATHS}
    refused = all(codes[:-1] == [401] * len(wrong) and codes[-1] in (200, 400) for codes in closed.values())
    open_ = {name: codes for name, codes in found.items() if name not in closed}
    hits = lines.count(KEY) + lines.count(WRONG)
    ratio = _compared()
    return {
        "what": "every route of the application, with no key, wrong ones and the right one",
        "reached": f"{len(closed)} routes: {'401 without the right key' if refused else 'NOT all closed'}, {hits} keys "
        f"in {lines.count(chr(10))} log lines, time for a wrong first over a wrong last character {ratio:.3f}",
        "figure": {
            "statuses": found, "keys_in_log": hits, "log_lines": lines.count("\n"), "log_level": "everything",
            "time_first_over_last_character_wrong": round(ratio, 3),
        },
        "passed": refused and hits == 0 and lines.count("\n") > 10
        and set(open_) == {f"GET {path}" for path in KEYLESS_PATHS} and abs(ratio - 1) < 0.05,
    }  # fmt: skip


def templates() -> Row:
    """Run test 23: a model whose template does harm on demand, then contents that a request may not bring."""
    port, refused = free_port(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as temporary, Listener() as elsewhere:
        model, log = sapling_with_template(Path(temporary) / NAME, BOMBS), Path(temporary) / "log"
        with log.open("w") as file, serving(model, port, "--name", NAME, "--log-prompts", log=file) as process:
            asyncio.run(_chat(port, "hello"))
            with Memory(process.pid) as memory:
                for told in ("loop", "one long step", "memory", "output", "bytes", "classes", "globals", "include"):
                    pairs = [[asyncio.run(_chat(port, one)) for one in (told, "hello")] for _ in range(5)]
                    refused[told] = {"statuses": sorted({(reply.status, after.status) for reply, after in pairs})}
                    for name, place in ("ms", 0), ("next_ms", 1):
                        seconds = [pair[place].seconds for pair in pairs]
                        refused[told][name] = round(statistics.median(seconds) * 1000, 1)
                        refused[told]["most_" + name] = round(max(seconds) * 1000, 1)
            formatted = asyncio.run(_chat(port, "format")).status
            asyncio.run(_chat(port, "{{ 7 * 191 }}{% for a in x %}"))
            image = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{elsewhere.port}/x.png"}}
            said = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
            brought = {
                "chat_template": {**said, "chat_template": "{{ 1 }}"},
                "chat_template_kwargs": {**said, "chat_template_kwargs": {"a": 1}},
                "image_url": {**said, "messages": [{"role": "user", "content": [image]}]},
                "file": {**said, "messages": [{"role": "user", "content": [{"type": "file", "file": {"url": "x"}}]}]},
            }
            statuses = {name: asyncio.run(ask(port, CHAT, body)).status for name, body in brought.items()}
        lines = log.read_text(encoding="utf-8")
    plain = "{{ 7 * 191 }}{% for a in x %}" in lines and "1337" not in lines
    slowest_ms = max(one["ms"] for one in refused.values())  # medians: the limit is of computing, not of the clock
    return {
        "what": "a model with a template that does harm, and requests that bring templates and addresses",
        "reached": f"{len(refused)} bombs × 5 refused, medians within {slowest_ms:.0f} ms, memory "
        f"{memory.growth_mb:+.0f} MB; {len(statuses)} kinds of templates and addresses in requests: "
        f"{sorted(set(statuses.values()))}, {elsewhere.count} connections",
        "figure": {
            "bombs": refused, "slowest_median_ms": slowest_ms, "rss_growth_mb": round(memory.growth_mb, 1),
            "format_of_an_attribute": formatted, "what_a_user_wrote_is_plain": plain, "brought_along": statuses,
            "connections_to_the_address": elsewhere.count,
        },
        "passed": all(one["statuses"] == [(400, 200)] for one in refused.values())
        and slowest_ms <= 100 and plain and set(statuses.values()) == {400} and elsewhere.count == 0,
    }  # fmt: skip


class Memory:
    """Peak growth of a process and its children while the block runs."""

    def __init__(self, pid: int) -> None:
        self.process, self.ending = psutil.Process(pid), threading.Event()
        self.before = self.peak = resident(self.process)
        self.thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Memory":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.ending.wait(0.02):
            try:
                self.peak = max(self.peak, resident(self.process))
            except psutil.NoSuchProcess:  # a child that ended
                continue

    @property
    def growth_mb(self) -> float:
        """Return the peak growth in millions of bytes."""
        return (self.peak - self.before) / 1e6


class Listener:
    """Counter of connections to an address that a request names."""

    def __init__(self) -> None:
        self.socket, self.count = socket.create_server(("127.0.0.1", 0)), 0
        self.port = self.socket.getsockname()[1]

    def __enter__(self) -> "Listener":
        self.socket.settimeout(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            while self.socket.accept():
                self.count += 1
        except TimeoutError:
            self.socket.close()


def _compared(rounds: int = 40_000) -> float:
    """Return the median time to refuse a key with a wrong first character over that with a wrong last one."""
    known, seconds = Keys([KEY]), {"#" + KEY[1:]: [0.0], KEY[:-1] + "#": [0.0]}
    for _ in range(rounds):
        for key, found in seconds.items():
            began = time.perf_counter()
            known.accept("Bearer " + key)
            found.append(time.perf_counter() - began)
    first, last = (statistics.median(found) for found in seconds.values())
    return first / last


async def _chat(port: int, told: str) -> Reply:
    body = {"model": NAME, "messages": [{"role": "user", "content": told}], "max_tokens": 1}
    return await ask(port, CHAT, body)


async def _sent(port: int, sent: bytes) -> Reply:
    return await (await Call.send(port, sent)).rest()


async def _dripped(port: int, sent: bytes, pause_s: float) -> Reply:
    """Send a byte at a time until the server replies."""
    call = await Call.send(port, sent)
    resting = asyncio.create_task(call.rest())
    while not resting.done():
        call.writer.write(b"x")
        await asyncio.wait({resting}, timeout=pause_s)
    return await resting


async def _several(count: int, call: Callable[[], Any]) -> list[Reply]:
    return [await call() for _ in range(count)]
