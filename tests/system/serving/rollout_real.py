"""Whole roll-outs with real processes: two `niwaki serve`, the gateway between them and its clients, faults in a proxy.

The dense model is the sapling. There are four canaries:

- `equal`: the same model
- `errors`: the same model behind a proxy that answers 2 % of the requests with 500
- `slow`: the same model behind a proxy that doubles the time of every byte
- `degraded`: the sapling without 70 % of its weights by magnitude

Limits are those of a pilot, the sapling at 4 bits, from the compare.json of `niwaki compare`. Clients send one request
after the other, half of them as streams, each as another user.

    python -m tests.system.serving.rollout_real --out benchmarks/results/serving/rollout-real-cpu.json

Two cores answer some dozens of requests per second, so decision intervals are short. They end after INTERVAL_S seconds
and the default of 500 requests of the canary. Shares are 50 and 100 %. Cost: five to ten minutes on two cores.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import aiohttp
import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from benchmarks.common.provenance import provenance
from niwaki.cli.demo import sapling
from niwaki.rollout.store import Store
from tests.system.serving.served import free_port, serving
from tests.system.serving.serving_fuzz import listening

NAME = "sapling"
INTERVAL_S = 10.0
POLICY = {"steps": [0.5, 1.0], "interval_s": INTERVAL_S, "min_requests": 500}
SAMPLING = {"audit_frac": 0.25, "max_audits": 4}
PROXIED = {"errors": {"errors": 0.02}, "slow": {"slow": 2.0}}
TEXTS = [text for text in topics.values() if len(text) > 500]
COMMAND = [sys.executable, "-m", "niwaki.cli"]


def proxy(port: int, url: str, errors: float, slow: float) -> None:
    """Serve a proxy: a share of 500s, and answers that take `slow` times as long."""
    rng = random.Random(1)

    async def passed(request: Request) -> Response:
        body, began = await request.body(), time.perf_counter()
        if request.method == "POST" and rng.random() < errors:
            return JSONResponse({"error": {"message": "injected"}}, 500)
        session = aiohttp.ClientSession()
        answer = await session.request(
            request.method, url + request.url.path, data=body, headers={"content-type": "application/json"}
        )

        async def chunks() -> AsyncIterator[bytes]:
            async with session, answer:
                arrived: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

                async def read() -> None:
                    while chunk := await answer.content.readany():
                        arrived.put_nowait((time.perf_counter(), chunk))
                    arrived.put_nowait((time.perf_counter(), b""))

                reading = asyncio.create_task(read())
                while True:
                    at, chunk = await arrived.get()
                    await asyncio.sleep(max(began + slow * (at - began) - time.perf_counter(), 0))
                    if not chunk:
                        break
                    yield chunk
                await reading

        return StreamingResponse(chunks(), answer.status, media_type=answer.content_type)

    app = Starlette(routes=[Route("/{path:path}", passed, methods=["GET", "POST"])])
    uvicorn.run(app, port=port, log_level="error")


@contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    """Run a process that listens until the block ends."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not listening(port):
            if time.monotonic() > until or process.poll() is not None:
                raise SystemExit(f"did not start: {' '.join(command)}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(timeout=120)


def made(folder: Path) -> Path:
    """Make the pilot and the degraded canary, and return the compare.json of the pilot."""
    for name, method, target in (("pilot", "rtn", "4bit"), ("degraded", "magnitude", "70%")):
        own = ["compress", str(sapling()), str(folder / name), "--method", method, "--target", target]
        subprocess.run([*COMMAND, *own], check=True, capture_output=True)
    data = folder / "held-out.jsonl"
    data.write_text("".join(json.dumps({"text": text[:2000]}) + "\n" for text in TEXTS), encoding="utf-8")
    own = ["compare", str(sapling()), str(folder / "pilot"), "--data", str(data), "--rounds", "0", "--seq-len", "256"]
    own += ["--max-tokens", "20000"]
    subprocess.run([*COMMAND, *own, "--report", str(folder / "report")], check=True, capture_output=True)
    return folder / "report" / "compare.json"


async def client(session: aiohttp.ClientSession, seed: int, ending: asyncio.Event, seen: Counter[str]) -> None:
    """Send requests until the end, and count the outcomes."""
    rng = random.Random(seed)
    number = 0
    while not ending.is_set():
        number += 1
        text, stream = rng.choice(TEXTS), rng.random() < 0.5
        start = rng.randrange(len(text) - 200)
        ask = {"model": NAME, "prompt": text[start : start + 200], "max_tokens": 8, "temperature": 0, "stream": stream}
        try:
            async with session.post("/v1/completions", json={**ask, "user": f"{seed}-{number}"}) as answer:
                whole = await answer.read()
            good = answer.status == 200 and (b"[DONE]" in whole if stream else b"choices" in whole)
            seen["answered" if good else f"status {answer.status}"] += 1
        except aiohttp.ClientError as error:
            seen[type(error).__name__] += 1


async def asked(port: int, store: Store, clients: int, max_s: float) -> dict[str, int]:
    """Keep up the load until the roll-out ends, and a little longer, because requests after a return count too."""
    seen: Counter[str] = Counter()
    ending, until = asyncio.Event(), time.monotonic() + max_s
    # A connection each: on a machine that is stopped for a while, kept ones would be closed while they are taken.
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector) as session:
        tasks = [asyncio.create_task(client(session, seed, ending, seen)) for seed in range(clients)]
        while time.monotonic() < until:
            await asyncio.sleep(0.5)
            state = await asyncio.to_thread(store.current)
            if state is not None and state.status != "running":
                await asyncio.sleep(3)
                break
        ending.set()
        await asyncio.gather(*tasks)
    return dict(seen)


def rolled_out(kind: str, folder: Path, limits: Path, clients: int, max_s: float) -> dict[str, Any]:
    """Run one roll-out from its first step to its end."""
    ports = {name: free_port() for name in ("dense", "canary", "proxy", "gateway")}
    model = folder / "degraded" if kind == "degraded" else sapling()
    config, where = folder / f"{kind}.yaml", folder / f"{kind}.sqlite"
    config.write_text(yaml.safe_dump({"policy": POLICY, "sampling": SAMPLING}), encoding="utf-8")
    with ExitStack() as stack:
        stack.enter_context(serving(sapling(), ports["dense"], "--name", NAME, "--dtype", "float32"))
        stack.enter_context(serving(model, ports["canary"], "--name", NAME, "--dtype", "float32"))
        before = "canary"
        if kind in PROXIED:
            before, how = "proxy", {"errors": 0.0, "slow": 1.0, **PROXIED[kind]}
            own = ["--proxy", str(ports["proxy"]), str(ports["canary"]), str(how["errors"]), str(how["slow"])]
            stack.enter_context(
                running([sys.executable, "-m", "tests.system.serving.rollout_real", *own], ports["proxy"])
            )
        own = ["rollout", "run", "--stable", f"http://127.0.0.1:{ports['dense']}", "--limits", str(limits)]
        own += ["--canary", f"http://127.0.0.1:{ports[before]}", "--candidate", "pilot", "--config", str(config)]
        own += ["--state", str(where), "--port", str(ports["gateway"])]
        stack.enter_context(running([*COMMAND, *own], ports["gateway"]))
        store = Store.open(where)
        seen = asyncio.run(asked(ports["gateway"], store, clients, max_s))
        time.sleep(INTERVAL_S)
    return record_of(store, seen)


def record_of(store: Store, seen: dict[str, int]) -> dict[str, Any]:
    """Return the record of a roll-out from its store and its clients."""
    state = store.current()
    assert state is not None
    intervals, decisions = store.intervals(state), store.decisions(state)[::-1]
    steps = state.policy.steps
    shares = [
        {
            "s": round(one["at"] - state.begun, 1),
            "did": one["action"],
            "share": steps[one["step"]] if one["status"] in ("running", "promoted") else 0.0,
        }
        for one in decisions
    ]
    requests: Counter[str] = Counter()
    failed = 0
    for interval in intervals:
        requests.update(interval.requests)
        failed += round(interval.histogram("error_rate").mean * interval.histogram("error_rate").total)
    return {
        "ended": state.status,
        "intervals": intervals[-1].number,
        "reason": decisions[-1]["reason"],
        "clients": seen,
        "client_errors": sum(count for what, count in seen.items() if what != "answered"),
        "requests": dict(requests),
        "canary_failures": failed,
        "audits": len(store.audits(state)),
        "shares": shares,
    }


def main() -> None:
    """Run every kind and write the result. Exit with 1 if one did not end as expected."""
    if sys.argv[1:2] == ["--proxy"]:
        port, server, errors, slow = sys.argv[2:]
        proxy(int(port), f"http://127.0.0.1:{server}", float(errors), float(slow))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="*", default=["equal", "errors", "slow", "degraded"])
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--max-s", "--most-s", type=float, default=600)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        limits = made(Path(temporary))
        for kind in given.kinds:
            found[kind] = rolled_out(kind, Path(temporary), limits, given.clients, given.max_s)
            print(kind, json.dumps(found[kind]), flush=True)
    right = [
        one["client_errors"] == 0
        and (one["ended"] == "promoted" if kind == "equal" else one["ended"] == "returned" and one["intervals"] <= 2)
        for kind, one in found.items()
    ]
    result = {
        "what": "roll-outs of the sapling with real servers; returned within two decision intervals, or promoted",
        **provenance("cpu"),
        "policy": POLICY,
        "sampling": SAMPLING,
        "clients": given.clients,
        "as_expected": all(right),
        "roll-outs": found,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(not all(right))


if __name__ == "__main__":
    main()
