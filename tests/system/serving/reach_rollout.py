"""Test 25: whole roll-outs with real processes: two servers, the gateway, its clients, and faults in a proxy.

The dense model is the sapling. There are four canaries:

- `equal`: the same model
- `errors`: the same model behind a proxy that answers 2 % of the requests with 500
- `slow`: the same model behind a proxy that doubles the time of every byte
- `worse`: the sapling without some weights, so that its perplexity is about 5 % higher

Limits are those of a pilot, the sapling at 4 bits, from the compare.json of `niwaki compare`, and 2 % of perplexity.
Clients send one request after the other, half of them as streams, each as another user. Intervals end after INTERVAL_S
seconds and `min_requests` of the canary. Every answer of the canary is audited, since 5 % of perplexity take some
hundred audits to be certain.
"""

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import aiohttp
import yaml

from benchmarks.serving.rollout_overhead import compared
from niwaki.cli.demo import sapling
from niwaki.rollout.store import Store
from tests.system.serving.reach_fuzz import listening
from tests.system.serving.served import free_port, serving

NAME = "sapling"
INTERVAL_S = 10.0
POLICY = {"steps": [0.05, 0.5], "interval_s": INTERVAL_S, "min_requests": 350}
SAMPLING = {"audit_frac": 1.0, "max_audits": 8}
KINDS = ("equal", "errors", "slow", "worse")
PROXIED = {"errors": (0.02, 1.0), "slow": (0.0, 2.0)}
WORSE = "14%"  # of the weights of each matrix
MAX_PERPLEXITY = 1.02
CLIENTS = 3  # with more, requests queue at the server of 95 % of them alone, and a slow canary looks fast
CORES = 2  # of one roll-out
TEXTS = [text for text in topics.values() if len(text) > 500]
COMMAND = [sys.executable, "-m", "niwaki.cli"]


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


def made(folder: Path) -> tuple[Path, float]:
    """Make the pilot and the worse canary; return the pilot's compare.json and the canary's ratio of perplexities."""
    data = folder / "held-out.jsonl"
    data.write_text("".join(json.dumps({"text": text[:2000]}) + "\n" for text in TEXTS), encoding="utf-8")
    for name, method, target in (("pilot", "rtn", "4bit"), ("worse", "magnitude", WORSE)):
        own = ["compress", str(sapling()), str(folder / name), "--method", method, "--target", target]
        subprocess.run([*COMMAND, *own], check=True, capture_output=True)
    own = ["compare", str(sapling()), str(folder / "pilot"), str(folder / "worse"), "--data", str(data)]
    own += ["--rounds", "0", "--seq-len", "256", "--max-tokens", "20000", "--report", str(folder / "report")]
    subprocess.run([*COMMAND, *own], check=True, capture_output=True)
    path = folder / "report" / "compare.json"
    found = json.loads(path.read_text(encoding="utf-8"))["candidates"]
    (worse,) = (one for one in found if "worse" in json.dumps(one.get("model", one)))
    return path, round(float(worse["data"][0]["whole"]["perplexity_ratio"]["value"]), 4)


async def client(session: aiohttp.ClientSession, seed: int, ending: asyncio.Event, seen: Counter[str]) -> None:
    """Send requests until the end, and count the outcomes."""
    rng = random.Random(seed)
    number = 0
    while not ending.is_set():
        number += 1
        text, stream = rng.choice(TEXTS), rng.random() < 0.5
        start = rng.randrange(len(text) - 200)
        ask = {"model": NAME, "prompt": text[start : start + 200], "max_tokens": 4, "temperature": 0, "stream": stream}
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
    model = folder / "worse" if kind == "worse" else sapling()
    config, where = folder / f"{kind}.yaml", folder / f"{kind}.sqlite"
    config.write_text(yaml.safe_dump({"policy": POLICY, "sampling": SAMPLING}), encoding="utf-8")
    with ExitStack() as stack:
        stack.enter_context(serving(sapling(), ports["dense"], "--name", NAME, "--dtype", "float32"))
        stack.enter_context(serving(model, ports["canary"], "--name", NAME, "--dtype", "float32"))
        before = "canary"
        if kind in PROXIED:
            before, own = "proxy", [str(ports["proxy"]), str(ports["canary"]), *map(str, PROXIED[kind])]
            script = [sys.executable, "-m", "tests.system.serving.faulty_proxy", *own]
            stack.enter_context(running(script, ports["proxy"]))
        own = ["rollout", "run", "--stable", f"http://127.0.0.1:{ports['dense']}", "--limits", str(limits)]
        own += ["--canary", f"http://127.0.0.1:{ports[before]}", "--candidate", "pilot", "--config", str(config)]
        own += ["--state", str(where), "--port", str(ports["gateway"]), "--limit", f"perplexity_ratio={MAX_PERPLEXITY}"]
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


def rolled_out_all(clients: int = CLIENTS, max_s: float = 2700) -> dict[str, Any]:
    """Run test 25: each kind of canary, several at a time on many cores, then the waits of users beside copies."""
    found: dict[str, Any] = {}

    def told(kind: str) -> None:
        found[kind] = rolled_out(kind, folder, limits, clients, max_s)
        print(kind, json.dumps(found[kind]), file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        limits, ratio = made(folder)
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // CORES)) as pool:
            list(pool.map(told, KINDS))
    shadow = compared(2000, 20.0)
    right = {
        kind: one["client_errors"] == 0
        and (one["ended"] == "promoted" if kind == "equal" else one["ended"] == "returned" and one["intervals"] <= 2)
        for kind, one in found.items()
    }
    told = "; ".join(f"{kind}: {one['ended']} in interval {one['intervals']}" for kind, one in found.items())
    errors = sum(one["client_errors"] for one in found.values())
    seen = sum(one["clients"].get("answered", 0) for one in found.values())
    change = shadow["shadow_p99_change"]
    return {
        "what": "roll-outs of the sapling with real servers at 5 and 50 %, faults by a proxy or by pruning; then 2,000 "
        "requests in turns with and without copies",
        "reached": f"{told}; {errors} errors for clients in {seen:,} requests; copies change P99 by {change:+.1%}",
        "figure": {
            "policy": POLICY, "sampling": SAMPLING, "clients": clients, "perplexity_of_worse": ratio,
            "as_wanted": right, "roll-outs": found, "shadow": shadow,
        },
        "passed": all(right.values()) and change <= 0.02,
    }  # fmt: skip
