"""Tests 19, 20 and 21: time limits, an orderly end, and an engine or a whole server that is killed."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.system.serving.served import Call, Reply, ask, free_port, metrics_of, sapling_with_template, serving, written

NAME, PATH = "tiny", "/v1/completions"
SHORT: dict[str, Any] = {"model": NAME, "prompt": "The garden", "max_tokens": 1, "temperature": 0}
CRASHED = 3  # exit code of a server whose engine ended
TOKEN_S = 0.03  # on top of what a token takes
SCRIPT = [sys.executable, "-m", "tests.system.serving.served_slowly"]
Row = dict[str, Any]


@contextmanager
def served_slowly(port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Serve the sapling with `TOKEN_S` more for every token, read or written."""
    with tempfile.TemporaryDirectory() as temporary:
        model = sapling_with_template(Path(temporary) / NAME)
        environment = {**os.environ, "REACH_TOKEN_S": str(TOKEN_S)}
        given = ("--name", NAME, "--dtype", "float32", *options)
        with serving(model, port, *given, command=SCRIPT, environment=environment) as process:
            yield process


def timeouts(rounds: int = 3) -> Row:
    """Run test 19: each time limit by itself, some times."""
    port, limits = free_port(), {"queue": 1.5, "first token": 2.0, "whole answer": 4.0, "stream": 4.0}
    long = {**SHORT, "max_tokens": 900}

    async def idle() -> None:
        while (now := await asyncio.to_thread(metrics_of, port))["niwaki_running"] + now["niwaki_queue_length"]:
            await asyncio.sleep(0.05)

    async def in_queue() -> tuple[int, float]:
        holding = await Call.send(port, written(PATH, {**long, "stream": True}))
        await holding.until(1)
        reply = await ask(port, PATH, SHORT)
        holding.cut()
        return reply.status, reply.seconds

    async def to_first_token() -> tuple[int, float]:
        reply = await ask(port, PATH, {**SHORT, "prompt": [5] * round(5 / TOKEN_S)})
        return reply.status, reply.seconds

    async def whole() -> tuple[int, float]:
        reply = await ask(port, PATH, long)
        return reply.status, reply.seconds

    async def stream() -> tuple[int, float]:
        reply = await ask(port, PATH, {**long, "stream": True})
        return (504 if reply.events[-1]["error"]["code"] == "timeout" else 0), reply.seconds

    async def all_rounds() -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {name: [] for name in limits}
        for _ in range(rounds):
            for name, one in zip(limits, (in_queue, to_first_token, whole, stream), strict=True):
                await idle()
                found[name].append(await one())
        return found

    options = ("--slots", "1", "--queue-timeout", "1.5", "--first-token-timeout", "2", "--timeout", "4")
    with served_slowly(port, *options):
        found = asyncio.run(all_rounds())
    off = {name: max(abs(seconds / limits[name] - 1) for _, seconds in seen) for name, seen in found.items()}
    statuses = {name: sorted({status for status, _ in seen}) for name, seen in found.items()}
    wanted = {"queue": [503], "first token": [504], "whole answer": [504], "stream": [504]}
    return {
        "what": f"time limits, {rounds} times each",
        "reached": f"{rounds} × {len(limits)} limits, at most {max(off.values()):.1%} off",
        "figure": {
            "limits_s": limits, "statuses": statuses,
            "max_off": {name: round(value, 4) for name, value in off.items()},
        },
        "passed": statuses == wanted and max(off.values()) <= 0.1,
    }  # fmt: skip


def terminated() -> Row:
    """Run test 20: two streams run, two requests wait, then SIGTERM."""
    port = free_port()
    body = {**SHORT, "max_tokens": 60}

    async def answered(process: subprocess.Popen[bytes]) -> dict[str, Any]:
        streams = [await Call.send(port, written(PATH, {**body, "stream": True})) for _ in range(2)]
        for call in streams:
            await call.until(2)
        waiting = [await Call.send(port, written(PATH, body)) for _ in range(2)]
        while (await asyncio.to_thread(metrics_of, port))["niwaki_queue_length"] < 2:
            await asyncio.sleep(0.01)
        resting = [asyncio.create_task(call.rest()) for call in (*streams, *waiting)]
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        while (await ask(port, "/ready", b"", method="GET")).status != 503:
            await asyncio.sleep(0.005)
        unready_s = time.monotonic() - began
        health = (await ask(port, "/health", b"", method="GET")).status
        refused = await ask(port, PATH, SHORT)
        replies = await asyncio.gather(*resting)
        finished_s = time.monotonic() - began
        return {
            "unready_s": unready_s, "health": health, "refused": refused, "replies": replies, "finished_s": finished_s,
            "began": began,
        }  # fmt: skip

    with served_slowly(port, "--slots", "2") as process:
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        found = asyncio.run(answered(process))
        code = process.wait(timeout=60)
        ended = time.monotonic()
        gone, left = psutil.wait_procs(everyone[1:], timeout=10)
        orphans_s = time.monotonic() - ended
    complete = [_complete(reply, 60) for reply in found["replies"]]
    refused = found["refused"]
    return {
        "what": "SIGTERM while two streams run and two requests wait",
        "reached": f"readiness 503 after {found['unready_s']:.3f} s, {sum(complete)} of {len(complete)} requests "
        f"finished in {found['finished_s']:.1f} s, {len(left)} orphans",
        "figure": {
            "unready_s": round(found["unready_s"], 3), "health_meanwhile": found["health"],
            "new_request": refused.status, "with_retry_after": "retry-after:" in refused.headers,
            "complete": f"{sum(complete)} of {len(complete)}", "finished_s": round(found["finished_s"], 2),
            "exit_code": code, "exit_s": round(ended - found["began"], 2),
            "children": len(everyone) - 1, "orphans": len(left), "children_gone_s_after_exit": round(orphans_s, 3),
        },
        "passed": found["unready_s"] <= 1 and refused.status == 503 and all(complete) and found["finished_s"] <= 30
        and code == 0 and not left and len(gone) > 0,
    }  # fmt: skip


def _complete(reply: Reply, tokens: int) -> bool:
    """Return whether an answer, whole or as a stream, has its end."""
    if "text/event-stream" in reply.headers:
        return bool(reply.events[-1]["choices"][0]["finish_reason"] == "length")
    return reply.status == 200 and bool(reply.json["usage"]["completion_tokens"] == tokens)


class Supervisor:
    """Supervisor that restarts a server after an error, as systemd does with Restart=on-failure."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.command, self.environment = command, environment
        self.codes: list[int] = []
        self.ended: list[float] = []
        self.process = self._start()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command, env=self.environment, stderr=subprocess.DEVNULL)

    def _watch(self) -> None:
        while (code := self.process.wait()) != 0:
            self.ended.append(time.monotonic())
            self.codes.append(code)
            self.process = self._start()

    def stop(self) -> None:
        """End the server in order."""
        self.process.terminate()
        self.thread.join(timeout=60)


def killed() -> Row:
    """Run test 21: kill the thread of the engine, then the whole process, each under a stream."""
    port, found = free_port(), {}
    with tempfile.TemporaryDirectory() as temporary:
        model = sapling_with_template(Path(temporary) / NAME)
        command = [*SCRIPT, "serve", str(model), "--port", str(port), "--device", "cpu", "--dtype", "float32"]
        supervisor = Supervisor([*command, "--name", NAME], {**os.environ, "REACH_TOKEN_S": str(TOKEN_S)})
        try:
            for name, sent in ("engine", signal.SIGUSR1), ("process", signal.SIGKILL):
                _until_health(port, 200)
                children = psutil.Process(supervisor.process.pid).children(recursive=True)
                found[name] = asyncio.run(_killed(port, supervisor, sent))
                _, left = psutil.wait_procs(children, timeout=10)
                found[name] |= {"children": len(children), "orphans_after_10_s": len(left)}
        finally:
            supervisor.stop()
    return {
        "what": "the engine's thread killed, then the process with SIGKILL, under a stream; a supervisor that restarts",
        "reached": "; ".join(
            f"{name} killed: health {one['health_became']} after {one['unhealthy_s']:.2f} s, stream ended after "
            f"{one['stream_ended_s']:.2f} s, healthy again after {one['healthy_again_s']:.0f} s"
            for name, one in found.items()
        ),
        "figure": {**found, "exit_codes": supervisor.codes},
        "passed": supervisor.codes == [CRASHED, -signal.SIGKILL]
        and all(max(one["unhealthy_s"], one["stream_ended_s"]) <= 5 for one in found.values())
        and all(one["answers_again"] and not one["orphans_after_10_s"] for one in found.values()),
    }  # fmt: skip


async def _killed(port: int, supervisor: Supervisor, sent: int) -> dict[str, Any]:
    call = await Call.send(port, written(PATH, {**SHORT, "max_tokens": 900, "stream": True}))
    await call.until(3)
    resting = asyncio.create_task(call.rest())
    began, exits = time.monotonic(), len(supervisor.codes)
    supervisor.process.send_signal(sent)
    seen = await asyncio.to_thread(_until_not_healthy, port)
    unhealthy_s = time.monotonic() - began
    told = (await resting).events[-1]
    stream_s = time.monotonic() - began
    while len(supervisor.codes) == exits:
        await asyncio.sleep(0.01)
    exit_s = supervisor.ended[-1] - began
    await asyncio.to_thread(_until_health, port, 200)
    again_s = time.monotonic() - began
    reply = await ask(port, PATH, SHORT)
    return {
        "health_became": seen, "unhealthy_s": round(unhealthy_s, 3), "stream_ended_s": round(stream_s, 3),
        "stream_was_told": told.get("error", {}).get("message"), "exit_s": round(exit_s, 3),
        "healthy_again_s": round(again_s, 2), "answers_again": reply.status == 200,
    }  # fmt: skip


def _health(port: int) -> int:
    """Return the status of /health, 0 if no answer comes."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code
    except httpx.HTTPError:
        return 0


def _until_not_healthy(port: int) -> str:
    while (found := _health(port)) == 200:
        time.sleep(0.01)
    return str(found) if found else "refused"


def _until_health(port: int, status: int) -> None:
    until = time.monotonic() + 600
    while _health(port) != status:
        if time.monotonic() > until:
            raise RuntimeError("the server did not start again")
        time.sleep(0.05)
