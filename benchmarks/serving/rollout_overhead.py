"""Overhead of the gateway per request, and the effect of copies on the wait of users: real sockets on loopback.

    python -m benchmarks.serving.rollout_overhead OUT.json --requests 2000

Direct, through the gateway, and through the gateway with every request copied, in turns: milliseconds at P50 and P99.
The upstream answers after `--upstream-ms` from a process of its own. The gateway runs in another one. The time is the
wait of the client. This needs a quiet machine with two cores. Cost: a minute.
"""

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.common.provenance import provenance

UPSTREAM = """
import asyncio, sys, uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
async def answer(request):
    await asyncio.sleep(float(sys.argv[2]) / 1000)
    return JSONResponse({"choices": [{"index": 0, "text": " moss"}], "usage": {"completion_tokens": 1}})
routes = [Route("/v1/completions", answer, methods=["POST"]), Route("/v1/models", answer)]
uvicorn.run(Starlette(routes=routes), port=int(sys.argv[1]), log_level="error")
"""
GATEWAY = ["-m", "niwaki.cli", "rollout", "run", "--limit", "top1_agreement=0.5", "--audit", "0", "--port"]


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


async def up(url: str) -> None:
    """Wait until the URL answers."""
    async with httpx.AsyncClient() as client:
        for _ in range(600):
            try:
                await client.get(f"{url}/v1/models")
            except httpx.HTTPError:
                await asyncio.sleep(0.05)
            else:
                return
    raise SystemExit(f"{url} did not start")


async def timed(url: str, requests: int, first: int) -> list[float]:
    """Return the milliseconds of every request, one after the other."""
    found = []
    async with httpx.AsyncClient(base_url=url) as client:
        for number in range(first, first + requests):
            body = {"model": "m", "prompt": f"prompt {number}", "user": str(number)}
            begin = time.perf_counter()
            answer = await client.post("/v1/completions", json=body)
            found.append(1000 * (time.perf_counter() - begin))
            assert answer.status_code == 200, answer.text
    return found


async def measured(urls: dict[str, str], requests: int) -> dict[str, list[float]]:
    """Time all ways in turns of a tenth each, so that a busy moment meets all. The first turn warms up."""
    found: dict[str, list[float]] = {name: [] for name in urls}
    for turn in range(11):
        for name, url in urls.items():
            times = await timed(url, requests // 10, turn * requests)
            found[name] += times if turn else []
    return found


def compared(requests: int, upstream_ms: float) -> dict[str, Any]:
    """Start the servers, send the requests, and return what the gateway and what copies cost."""
    ports = {name: free_port() for name in ("upstream", "gateway", "shadow")}
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    started = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            upstream = [sys.executable, "-c", UPSTREAM, str(ports["upstream"]), str(upstream_ms)]
            started.append(subprocess.Popen(upstream))
            for name, share in (("gateway", "0"), ("shadow", "1")):
                steps = Path(folder) / f"{name}.yaml"
                steps.write_text("policy: {steps: [0.0, 1.0]}\nsampling: {max_shadows: 64}\n")
                both = ["--stable", urls["upstream"], "--canary", urls["upstream"], "--config", str(steps)]
                state = ["--state", f"{folder}/{name}.sqlite", "--shadow", share]
                started.append(subprocess.Popen([sys.executable, *GATEWAY, str(ports[name]), *both, *state]))
            for url in urls.values():
                asyncio.run(up(url))
            found = asyncio.run(measured(urls, requests))
        finally:
            for process in started:
                process.terminate()
                process.wait()
    at = {name: {f"p{p}_ms": round(float(np.percentile(v, p)), 3) for p in (50, 99)} for name, v in found.items()}
    return {
        "direct": at["upstream"],
        "gateway": at["gateway"],
        "gateway, all copied": at["shadow"],
        "overhead_p50_ms": round(at["gateway"]["p50_ms"] - at["upstream"]["p50_ms"], 3),
        "shadow_p99_change": round(at["shadow"]["p99_ms"] / at["gateway"]["p99_ms"] - 1, 4),
    }


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--upstream-ms", type=float, default=20.0)
    asked = parser.parse_args()
    what = f"{asked.requests} requests one after the other, upstream {asked.upstream_ms} ms"
    result = {"what": what, **provenance("cpu"), **compared(asked.requests, asked.upstream_ms)}
    asked.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
