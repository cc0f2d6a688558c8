"""Tests 13, 14, 15 and 24: more requests than the server can answer, clients that leave, and their counts."""

import asyncio
import random
import time
from collections import Counter
from typing import Any

import numpy as np
import psutil

from tests.system.serving.served import Call, Reply, ask, free_port, metrics_of, resident, served_sapling, written

NAME, PATH, CHAT = "tiny", "/v1/completions", "/v1/chat/completions"
LONG: dict[str, Any] = {"model": NAME, "prompt": "The garden", "temperature": 1.0, "stream": True}
Row = dict[str, Any]


def overload(seconds: float = 15.0) -> Row:
    """Run test 13: ten times the rate of requests that the server can answer, for some seconds."""
    port, body = free_port(), {"model": NAME, "prompt": "The garden", "max_tokens": 32, "temperature": 0}
    with served_sapling(port, NAME, "--slots", "4", "--queue", "16", "--dtype", "float32") as process:
        watched = psutil.Process(process.pid)

        async def closed_loop(until: float) -> int:
            count = 0
            while time.monotonic() < until:
                count += (await ask(port, PATH, body)).status == 200
            return count

        async def capacity(span: float = 6.0) -> float:
            until = time.monotonic() + span
            return sum(await asyncio.gather(*(closed_loop(until) for _ in range(8)))) / span

        async def later(when: float) -> Reply:
            await asyncio.sleep(when)
            return await ask(port, PATH, body)

        async def offered(rate: float) -> tuple[list[Reply], int]:
            peak, ending = 0, asyncio.Event()

            async def look() -> None:
                nonlocal peak
                while not ending.is_set():
                    peak = max(peak, resident(watched))
                    await asyncio.sleep(0.2)

            looking = asyncio.create_task(look())
            replies = await asyncio.gather(*(later(number / rate) for number in range(round(seconds * rate))))
            ending.set()
            await looking
            return replies, peak

        answered_per_s = asyncio.run(capacity())
        before = resident(watched)
        replies, peak = asyncio.run(offered(10 * answered_per_s))
    statuses = Counter(reply.status for reply in replies)
    refused = [reply for reply in replies if reply.status == 429]
    complete = sum(
        reply.status == 200 and reply.json["usage"]["completion_tokens"] == 32 for reply in replies
    )  # an answer that ends early is a lost one
    told = sum("retry-after:" in reply.headers for reply in refused)
    p99_ms = float(np.quantile([reply.seconds for reply in refused], 0.99)) * 1000
    growth_mb = (peak - before) / 1e6
    lost = statuses[200] - complete + sum(statuses.values()) - statuses[200] - statuses[429]
    return {
        "what": "ten times as many requests as are answered",
        "reached": f"{len(replies):,} requests at {10 * answered_per_s:.0f}/s: rejections P99 {p99_ms:.0f} ms, "
        f"{told:,} of {len(refused):,} with Retry-After, {lost} accepted lost, RSS {growth_mb:+.1f} MB",
        "figure": {
            "answered_per_s_alone": round(answered_per_s, 1), "offered_per_s": round(10 * answered_per_s, 1),
            "seconds": seconds, "statuses": {str(status): count for status, count in sorted(statuses.items())},
            "rejection_p50_ms": round(float(np.median([reply.seconds for reply in refused])) * 1000, 1),
            "rejection_p99_ms": round(p99_ms, 1), "with_retry_after": told, "lost": lost,
            "rss_growth_mb": round(growth_mb, 1),
        },
        "passed": p99_ms <= 100 and told == len(refused) > 0 and lost == 0 and growth_mb <= 100,
    }  # fmt: skip


def cancelled_streams(count: int = 200) -> Row:
    """Run test 14: clients hang up all at once while four others listen."""
    port = free_port()
    prompts = [f"The garden {word}" for word in ("is", "was", "of", "in")]
    others = [{**LONG, "prompt": prompt, "seed": 1, "max_tokens": 500} for prompt in prompts]

    async def listen() -> list[Call]:
        calls = [await Call.send(port, written(PATH, body)) for body in others]
        for call in calls:
            await call.until(2)
        return calls

    async def alone() -> list[str]:
        return [reply.text for reply in await asyncio.gather(*(call.rest() for call in await listen()))]

    async def disturbed() -> dict[str, Any]:
        calls = await listen()
        leaving = [await Call.send(port, written(PATH, {**LONG, "max_tokens": 800})) for _ in range(count)]
        resting = [asyncio.create_task(call.rest()) for call in calls]
        await asyncio.sleep(2)
        held = await _slots(port)
        for call in leaving:
            call.cut()
        began = time.monotonic()
        while sum(await _slots(port)) > len(others):
            await asyncio.sleep(0.01)
        free_s = time.monotonic() - began
        running = sum(not task.done() for task in resting)
        reply = await ask(port, PATH, {"model": NAME, "prompt": "The garden", "max_tokens": 4})
        texts = [one.text for one in await asyncio.gather(*resting)]
        return {"held": held, "free_s": free_s, "running": running, "next": reply, "texts": texts}

    with served_sapling(port, NAME, "--slots", "32", "--queue", "256", "--dtype", "float32"):
        wanted = asyncio.run(alone())
        found = asyncio.run(disturbed())
        cancelled = metrics_of(port)['niwaki_requests_total{outcome="cancelled",route="completions"}']
    same = sum(one == two for one, two in zip(found["texts"], wanted, strict=True))
    return {
        "what": f"{count} streams cut at once, in slots and in the queue",
        "reached": f"slots free in {found['free_s']:.2f} s, next request in {found['next'].seconds:.2f} s, {same} of "
        f"{len(others)} other streams as alone, {cancelled:.0f} counted as cancelled",
        "figure": {
            "running_and_queued_before": found["held"], "slots_free_s": round(found["free_s"], 3),
            "next_request_s": round(found["next"].seconds, 3), "others_same_text": same,
            "others_running_then": found["running"], "characters_of_others": [len(text) for text in wanted],
            "counted_as_cancelled": cancelled,
        },
        "passed": found["free_s"] <= 1 and found["next"].status == 200 and found["next"].seconds <= 5
        and same == len(others) and found["running"] > 0 and sum(found["held"]) == count + len(others)
        and cancelled == count,
    }  # fmt: skip


def cancelled_in_queue() -> Row:
    """Run test 15: two requests wait for a stream, and the first leaves."""
    port, active = free_port(), {**LONG, "seed": 1, "max_tokens": 300}

    async def disturbed() -> tuple[Reply, Reply, list[float]]:
        call = await Call.send(port, written(PATH, active))
        await call.until(3)
        resting = asyncio.create_task(call.rest())
        leaving = await Call.send(port, written(PATH, {**LONG, "max_tokens": 50}))
        while (await _slots(port))[1] < 1:
            await asyncio.sleep(0.01)
        staying = asyncio.create_task(ask(port, PATH, {**LONG, "max_tokens": 5}))
        while (await _slots(port))[1] < 2:
            await asyncio.sleep(0.01)
        leaving.cut()
        while (await _slots(port))[1] > 1:
            await asyncio.sleep(0.01)
        held = await _slots(port)
        return await resting, await staying, held

    with served_sapling(port, NAME, "--slots", "1", "--queue", "8", "--queue-timeout", "600", "--dtype", "float32"):
        wanted = asyncio.run(ask(port, PATH, active)).text
        found, stayed, held = asyncio.run(disturbed())
        cancelled = metrics_of(port)['niwaki_requests_total{outcome="cancelled",route="completions"}']
    return {
        "what": "a waiting request is cancelled while another one is answered",
        "reached": f"active output {'unchanged' if found.text == wanted else 'CHANGED'} ({len(wanted)} characters), "
        f"the waiting one answered with {stayed.status}",
        "figure": {
            "same_text": found.text == wanted, "characters": len(wanted), "running_and_queued_after": held,
            "the_one_behind": stayed.status, "counted_as_cancelled": cancelled,
        },
        "passed": found.text == wanted and held == [1, 1] and stayed.status == 200 and cancelled == 1,
    }  # fmt: skip


def counted(requests: int = 10_000, clients: int = 12) -> Row:
    """Run test 24: /metrics counts what clients count, and no request makes a series of its own."""
    port, seen = free_port(), Counter[tuple[str, str]]()
    tokens: Counter[str] = Counter()
    outcome = {200: "answered", 429: "rejected"}

    async def client(seed: int, share: int) -> None:
        chosen = random.Random(seed)
        for _ in range(share):
            route = chosen.choice((PATH, CHAT))
            reply = await ask(port, route, *_some(chosen, route))
            seen[route, outcome.get(reply.status, "invalid" if 400 <= reply.status < 500 else str(reply.status))] += 1
            if reply.status == 429:
                await asyncio.sleep(0.1)
            if reply.status == 200:
                stream = "text/event-stream" in reply.headers
                usage = (reply.events[-1] if stream else reply.json)["usage"]
                tokens["prompt"] += usage["prompt_tokens"]
                tokens["written"] += usage["completion_tokens"]

    async def everyone() -> None:
        shares = [requests // clients + (seed < requests % clients) for seed in range(clients)]
        await asyncio.gather(*(client(seed, share) for seed, share in enumerate(shares)))

    async def strange() -> None:
        for number in range(200):
            await ask(port, f"/v1/{number}", {}, {"X-Model": str(number)})

    with served_sapling(port, NAME, "--slots", "4", "--queue", "7", "--dtype", "float32"):
        series = set(metrics_of(port))
        asyncio.run(strange())
        began = time.monotonic()
        asyncio.run(everyone())
        seconds = time.monotonic() - began
        now = metrics_of(port)
    short = {PATH: "completions", CHAT: "chat"}
    wanted = {f'niwaki_requests_total{{outcome="{name}",route="{short[path]}"}}': n for (path, name), n in seen.items()}
    wanted |= {f"niwaki_{name}_tokens_total": count for name, count in tokens.items()}
    found = {name: now.get(name) for name in wanted}
    total = sum(value for name, value in now.items() if name.startswith("niwaki_requests_total"))
    return {
        "what": f"counts of {requests:,} requests, of {clients} clients at once",
        "reached": f"{total:,.0f} requests of {clients} clients: "
        f"{sum(found[name] == wanted[name] for name in wanted)} of {len(wanted)} totals equal, "
        f"{len(set(now) - series)} new series of {len(series)}",
        "figure": {
            "clients": wanted, "metrics": found, "metrics_total": total, "seconds": round(seconds, 1),
            "series": len(series), "new_series": len(set(now) - series),
        },
        "passed": found == wanted and total == requests and set(now) == series,
    }  # fmt: skip


def _some(chosen: random.Random, route: str) -> tuple[Any, dict[str, str]]:
    """Return a body and headers: right, wrong, or not even JSON."""
    body: dict[str, Any] = {"model": NAME, "max_tokens": chosen.randint(1, 3)}
    text = "word " * chosen.randint(1, 20)
    body |= {"prompt": text} if route == PATH else {"messages": [{"role": "user", "content": text}]}
    kind = chosen.random()
    if kind < 0.3:
        return {**body, "stream": True, "stream_options": {"include_usage": True}}, {}
    if kind < 0.6:
        return body, {}
    wrong: list[tuple[Any, dict[str, str]]] = [
        ({**body, "n": 2}, {}), ({**body, "model": f"other-{chosen.random()}"}, {}), (b"{", {}),
        ({**body, "max_tokens": 5000}, {}), (body, {"Content-Type": "text/plain"}), (body, {"X-Long": "x" * 17_000}),
    ]  # fmt: skip
    return chosen.choice(wrong)


async def _slots(port: int) -> list[float]:
    """Return the numbers of running and of queued requests."""
    now = await asyncio.to_thread(metrics_of, port)
    return [now["niwaki_running"], now["niwaki_queue_length"]]
