"""Test 16: malformed requests of every kind against `niwaki serve` or the gateway: all are refused, others notice none.

A seed makes the bytes: fields of the wrong type or size, bodies with a false length, strange headers and paths.
Other bodies are JSON that is cut, flipped or nested. The answer to a request that is surely wrong must be 4xx or a
closed connection. The answer to one that may be right must be below 500. After every hundred the server must answer a
right request.

The gateway is `niwaki rollout run` before such a server, which is both sides. Half of the requests are the canary's. A
tenth of the others is copied, a tenth of the answers audited.
"""

import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "tiny"
RIGHT: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": NAME, "prompt": "Hello", "max_tokens": 1},
    "/v1/chat/completions": {"model": NAME, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1},
}
FIELDS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stop", "seed",
    "stream", "stream_options", "logprobs", "top_logprobs", "echo", "best_of", "tools", "chat_template", "logit_bias",
    "response_format", "suffix", "nonsense", "__class__", "",
)  # fmt: skip
JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, 10**400, 1e308, -0.5, 1.5, "", "x", "\x00", "\ud800", "x" * 70_000,
    "{{ 7 * 7 }}", "../../etc/passwd", "http://127.0.0.1/", [], [[]], [["x"]], [[[1]]], [None], [1, "x"], ["x"] * 50,
    [-1], [10**9], {},
    {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, {"$ref": "#"}, [{"role": "user"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}],
    [{"role": "", "content": "x"}], [{"role": "user", "content": None}], float("nan"), float("inf"),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Bytes of a request. `wrong`: it is surely wrong. `ends`: a server can tell its end."""

    sent: bytes
    wrong: bool
    ends: bool = True


def request(path: str, body: bytes, *, method: str = "POST", headers: dict[str, str] | None = None) -> bytes:
    """Return the bytes of a request."""
    usual = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(body))}
    lines = [f"{name}: {value}" for name, value in {**usual, "Connection": "close", **(headers or {})}.items()]
    return f"{method} {path} HTTP/1.1\r\n".encode() + "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def cases(seed: int, count: int) -> Iterator[Case]:
    """Yield `count` requests."""
    chosen = random.Random(seed)
    makers = (_other_field, _other_field, _broken_json, _nested, _other_headers, _other_route, _other_bytes)
    for _ in range(count):
        path = chosen.choice(list(RIGHT))
        yield chosen.choice(makers)(chosen, path, dict(RIGHT[path]))


def _other_field(chosen: random.Random, path: str, given: dict[str, Any]) -> Case:
    for _ in range(chosen.randint(1, 3)):
        given[chosen.choice(FIELDS)] = chosen.choice(JUNK)
    given["max_tokens"] = given.get("max_tokens") if chosen.random() < 0.5 else 1
    if isinstance(given["max_tokens"], int) and given["max_tokens"] > 1:
        given["max_tokens"] = 2**40  # a long answer tests nothing more
    return Case(request(path, json.dumps(given).encode("utf-8", "surrogatepass")), wrong=False)


def _broken_json(chosen: random.Random, path: str, given: dict[str, Any]) -> Case:
    body = bytearray(json.dumps(given).encode())
    kind = chosen.randrange(4)
    if kind == 0:
        body = body[: chosen.randrange(len(body))]
    elif kind == 1:
        body = bytearray(chosen.randbytes(chosen.randrange(1, 500)))
    elif kind == 2:
        body += b"}" * chosen.randint(1, 5)
    else:
        body[chosen.randrange(1, len(body))] = chosen.choice(b"\x00\xff{}[\x80")
        return Case(request(path, bytes(body)), wrong=False)  # within a string it may be right
    return Case(request(path, bytes(body)), wrong=True)


def _nested(chosen: random.Random, path: str, given: dict[str, Any]) -> Case:
    depth, (opened, closed) = chosen.randint(50, 50_000), chosen.choice((("[", "]"), ('{"a":', "}")))
    value = opened * depth + "1" + closed * (depth if chosen.random() < 0.7 else 0)
    whole = value if chosen.random() < 0.5 else json.dumps(given)[:-1] + ', "stop": ' + value + "}"
    return Case(request(path, whole.encode()), wrong=True)


def _other_headers(chosen: random.Random, path: str, given: dict[str, Any]) -> Case:
    wrong = (
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/xml"},
        {"Content-Encoding": "gzip"},
        {"Content-Length": "-1"},
        {"Content-Length": "99999999999"},
        {"Content-Length": "x"},
        {"Transfer-Encoding": "chunked"},
        {"Transfer-Encoding": "gzip, chunked"},
        {"X-Long": "x" * chosen.choice((17_000, 30_000))},
        {f"X-{number}": "y" * 100 for number in range(200)},
    )
    headers = chosen.choice(wrong)
    sent = request(path, json.dumps(given).encode(), headers=headers)
    return Case(sent, wrong=True, ends="Transfer-Encoding" not in headers)


def _other_route(chosen: random.Random, path: str, given: dict[str, Any]) -> Case:
    others = ("/v1/completions/", "/v1/embeddings", "/v1/../v1", "//", "/%00", "/v1/models/%2e%2e", "/v1/files", "/é")
    if chosen.random() < 0.5:
        method = chosen.choice(("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "NONSENSE"))
        return Case(request(path, b"", method=method), wrong=True)
    sent = request("PATH", json.dumps(given).encode())
    return Case(sent.replace(b"PATH", chosen.choice(others).encode(), 1), wrong=True)


def _other_bytes(chosen: random.Random, path: str, given: dict[str, Any]) -> Case:
    if chosen.random() < 0.2:
        return Case(chosen.randbytes(chosen.randrange(1, 2000)), wrong=True, ends=False)
    sent = request(path, json.dumps(given).encode())
    kinds = (
        b"\r\n" * chosen.randint(1, 20) + b"GET\r\n\r\n",
        sent.replace(b"HTTP/1.1", b"HTTP/x.y"),
        sent.replace(b"POST", b"PO ST"),
        sent.replace(b"\r\n", b"\n ", 2),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    )
    return Case(chosen.choice(kinds), wrong=True)


def exchange(port: int, sent: bytes, *, ends: bool = True, seconds: float = 30) -> int:
    """Send bytes and return the status, 0 if the connection was closed without one, as for a request without end."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        found = b""
        try:
            connection.sendall(sent)
            if not ends:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                found += part
        except (ConnectionResetError, BrokenPipeError):
            pass  # refused before all was sent
    return int(found[9:12]) if found.startswith(b"HTTP/1.1 ") else 0


def healthy(port: int) -> bool:
    """Return whether right requests are answered on both routes."""
    return all(exchange(port, request(path, json.dumps(body).encode())) == 200 for path, body in RIGHT.items())


@contextmanager
def gateway(server: int, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run `niwaki rollout run` with one server as both sides, and yield it once it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "rollout.yaml"
        config.write_text("policy: {steps: [0.5], min_requests: 1000000}\n", encoding="utf-8")
        url = f"http://127.0.0.1:{server}"
        command = [sys.executable, "-m", "niwaki.cli", "rollout", "run", "--stable", url, "--canary", url]
        options = ["--config", str(config), "--state", f"{folder}/state.sqlite", "--limit", "top1_agreement=0.5"]
        options += ["--shadow", "0.1", "--audit", "0.1", "--port", str(port)]
        process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
        try:
            until = time.monotonic() + 60
            while not listening(port):
                if time.monotonic() > until or process.poll() is not None:
                    raise SystemExit("the gateway did not start")
                time.sleep(0.1)
            yield process
        finally:
            process.terminate()
            process.wait(timeout=60)


def listening(port: int) -> bool:
    """Return whether a process accepts connections."""
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def judge(case: Case, status: int) -> str | None:
    """Return the fault of an answer, None if it has none."""
    if status >= 500:
        return f"{status} to {case.sent[:300]!r}"
    if case.wrong and status and not 400 <= status < 500:
        return f"{status} to a request that is wrong: {case.sent[:300]!r}"
    return None


def fuzzed(cases_each: int = 10_000) -> dict[str, Any]:
    """Run test 16 against a server on the sapling, then against a gateway before it."""
    found = {name: _fuzzed(cases_each, name == "gateway") for name in ("server", "gateway")}
    fives = sum(count for one in found.values() for status, count in one["statuses"].items() if status >= "5")
    failures = [failure for one in found.values() for failure in one["failures"]]
    restarts = sum(one["restarts"] for one in found.values())
    return {
        "what": "malformed requests to `niwaki serve` and to the gateway; after every hundred a right one",
        "reached": f"{cases_each:,} cases each to server and gateway: {fives} × 5xx, {restarts} restarts, "
        f"{len(failures)} wrong answers",
        "figure": found,
        "passed": not fives and not failures and not restarts,
    }


def _fuzzed(count: int, to_gateway: bool, seed: int = 0) -> dict[str, Any]:
    """Send the requests, and return the statuses, the failures and whether a process ended."""
    from tests.system.serving.served import free_port, served_sapling

    port = free_port()
    with ExitStack() as stack:
        processes = [stack.enter_context(served_sapling(port, NAME))]
        if to_gateway:
            server, port = port, free_port()
            processes.append(stack.enter_context(gateway(server, port)))
        began = time.monotonic()
        statuses: Counter[int] = Counter()
        wrong = []
        for number, case in enumerate(cases(seed, count), start=1):
            status = exchange(port, case.sent, ends=case.ends)
            statuses[status] += 1
            wrong += [found] if (found := judge(case, status)) else []
            if number % 100 == 0 and not healthy(port):
                wrong.append(f"not healthy after {number} cases")
        seconds = time.monotonic() - began
        alive = all(process.poll() is None for process in processes)
    return {
        "cases": count, "seed": seed, "seconds": round(seconds, 1), "restarts": int(not alive), "failures": wrong[:20],
        "statuses": {str(status): number for status, number in sorted(statuses.items())},
    }  # fmt: skip
