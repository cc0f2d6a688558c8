"""Test 26: `niwaki serve` under mixed load for a long time: no failure, no growing memory, no slower answers.

Clients ask for texts and chats, whole and as streams, hang up in the middle, and send wrong requests. The server is a
process of its own. Its resident memory and that of its children is read every few seconds. The slope of a line through
the values after the first tenth counts. A control says what the machine did meanwhile: a fixed computation here, timed
beside each reading of the memory.
"""

import random
import statistics
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import openai
import psutil

from tests.system.serving.served import computed, free_port, resident, served_sapling

NAME, CLIENTS, PAUSE_S = "tiny", 6, 3.0
WORDS = ("garden", "tree", "import", "class", "value", "return", "exception", "module", "string", "walk", "water")
Row = dict[str, Any]


class Load:
    """Clients that send requests until the end, and the outcomes of these."""

    def __init__(self, port: int, pause: float) -> None:
        self.pause = pause
        self.url, self.ending = f"http://127.0.0.1:{port}/v1", threading.Event()
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []
        self.first_tokens: list[tuple[float, float]] = []  # when, seconds

    def run(self, seed: int) -> None:
        """Run one client."""
        chosen = random.Random(seed)
        client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)
        while not self.ending.is_set():
            kind = chosen.choice(("text", "chat", "stream", "stream", "left", "wrong"))
            try:
                getattr(self, kind)(client, chosen)
                self.outcomes[kind] += 1
            except openai.RateLimitError:
                self.outcomes["429"] += 1
                time.sleep(0.5)
            except openai.OpenAIError as error:
                self.failures.append(f"{kind}: {error}"[:300])
            if self.pause:
                self.ending.wait(chosen.expovariate(1 / self.pause))

    def text(self, client: openai.OpenAI, chosen: random.Random) -> None:
        """Request a whole text, or the scores of one."""
        scoring = chosen.random() < 0.5
        most = 0 if scoring else chosen.randint(1, 40)
        client.completions.create(model=NAME, prompt=_words(chosen), max_tokens=most, echo=scoring, logprobs=2)

    def chat(self, client: openai.OpenAI, chosen: random.Random) -> None:
        """Request a whole answer."""
        message = {"role": "user", "content": _words(chosen)}
        client.chat.completions.create(model=NAME, messages=[message], max_tokens=chosen.randint(1, 40))  # type: ignore[list-item]

    def stream(self, client: openai.OpenAI, chosen: random.Random) -> None:
        """Request an answer as a stream, and time its first chunk."""
        began = time.monotonic()
        pieces = client.completions.create(
            model=NAME, prompt=_words(chosen), max_tokens=chosen.randint(2, 60), stream=True
        )
        for number, _ in enumerate(pieces):
            if number == 0:
                self.first_tokens.append((began, time.monotonic() - began))

    def left(self, client: openai.OpenAI, chosen: random.Random) -> None:
        """Request a stream and close it in the middle."""
        pieces = client.completions.create(model=NAME, prompt=_words(chosen), max_tokens=200, stream=True)
        for _ in range(chosen.randint(1, 10)):
            next(pieces, None)
        pieces.close()

    def wrong(self, client: openai.OpenAI, chosen: random.Random) -> None:
        """Send a request that the server must refuse."""
        try:
            client.completions.create(model=NAME, prompt="x", n=chosen.randint(2, 9))
        except openai.BadRequestError:
            return
        self.failures.append("a wrong request was answered")


def _words(chosen: random.Random) -> str:
    return " ".join(chosen.choices(WORDS, k=chosen.randint(1, 120)))


def drift(timed: list[tuple[float, float]]) -> dict[str, float]:
    """Return P99 of (when, seconds) in the first and the last quarter."""
    ordered = [seconds for _, seconds in sorted(timed)]
    quarter = max(len(ordered) // 4, 2)
    first, last = (statistics.quantiles(part, n=100)[98] for part in (ordered[:quarter], ordered[-quarter:]))
    return {"first_quarter_s": round(first, 4), "last_quarter_s": round(last, 4), "drift": round(last / first - 1, 3)}


def soaked(minutes: float) -> Row:
    """Run test 26 for some minutes."""
    port, span = free_port(), 60 * minutes
    with served_sapling(port, NAME, "--slots", "4", "--dtype", "float32") as process:
        load, watched = Load(port, PAUSE_S), psutil.Process(process.pid)
        threads = [threading.Thread(target=load.run, args=(seed,)) for seed in range(CLIENTS)]
        for thread in threads:
            thread.start()
        began, used = time.monotonic(), computed(watched)
        seen: list[tuple[float, int]] = []
        control: list[tuple[float, float]] = []
        while time.monotonic() - began < span and process.poll() is None:
            time.sleep(min(5.0, span / 20))
            seen.append((time.monotonic() - began, resident(watched)))
            control.append((time.monotonic(), _computing()))
        used, elapsed = computed(watched) - used, time.monotonic() - began
        load.ending.set()
        for thread in threads:
            thread.join()
        alive = process.poll() is None
    kept = np.array([(when, size) for when, size in seen if when > span / 10])
    slope = float(np.polyfit(kept[:, 0] / 3600, kept[:, 1] / 1e6, 1)[0])
    return _row(load, elapsed, slope, alive, {
        "clients": CLIENTS, "pause_s": PAUSE_S, "outcomes": dict(load.outcomes), "failures": load.failures[:20],
        "alive": alive, "cpu_share_of_one_core": round(used / elapsed, 3),
        "rss_mb": {"first": round(kept[0, 1] / 1e6, 1), "last": round(kept[-1, 1] / 1e6, 1)},
        "control_p99": drift(control),
    })  # fmt: skip


def _row(load: Load, elapsed: float, slope: float, alive: bool, more: dict[str, Any]) -> Row:
    waits, answered = drift(load.first_tokens), sum(load.outcomes.values())
    control = more["control_p99"]["drift"]
    return {
        "what": "mixed load on `niwaki serve` of the sapling; slope of the resident memory after the first tenth",
        "reached": f"{elapsed / 60:.0f} minutes, {answered:,} requests: {len(load.failures)} failures, {slope:+.1f} "
        f"MB/h, P99 of the first token {waits['drift']:+.0%}, of a fixed computation beside it {control:+.0%}",
        "figure": {
            "minutes": round(elapsed / 60, 1), "failed": len(load.failures), "rss_slope_mb_per_hour": round(slope, 2),
            "first_token_p99": waits, **more,
        },
        "passed": alive and not load.failures and slope <= 10 and waits["drift"] <= 0.1,
        **({} if elapsed >= 7 * 3600 else {"not_run": f"7 h: {elapsed / 60:.0f} minutes were run"}),
    }  # fmt: skip


def _computing() -> float:
    """Return the seconds of a fixed computation."""
    began = time.perf_counter()
    sum(range(400_000))
    return time.perf_counter() - began
