"""Turns by a clock of our own, and memory that is really taken."""

from collections.abc import Callable, Iterator

import pytest
import torch

from niwaki.measure.bench import timing
from niwaki.measure.bench.timing import MemoryMeter, measure_bandwidth, time_in_turns

CPU = torch.device("cpu")


def works(order: list[str], clock: list[float]) -> list[Callable[[], float]]:
    """Two that take one second and two, and say so."""

    def work(name: str, seconds: float) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            clock[0] += seconds
            return seconds

        return run

    return [work("dense", 1.0), work("form", 2.0)]


def test_turns_alternate_and_every_round_is_kept() -> None:
    order, clock = list[str](), [0.0]
    found = time_in_turns(works(order, clock), rounds=3, seconds=100, clock=lambda: clock[0])
    assert order == ["dense", "form"] * 3
    assert found == [[1.0] * 3, [2.0] * 3]


@pytest.mark.parametrize(("seconds", "rounds"), [(0.5, 1), (3.0, 1), (3.5, 2), (9.0, 3)])
def test_no_round_begins_when_the_time_is_over_and_one_always_does(seconds: float, rounds: int) -> None:
    order, clock = list[str](), [0.0]
    found = time_in_turns(works(order, clock), rounds=5, seconds=seconds, clock=lambda: clock[0])
    assert [len(times) for times in found] == [rounds, rounds]


def test_bandwidth_is_bytes_over_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def ticks() -> Iterator[float]:
        yield from (0.0, 1.0, 1.0, 3.0, 3.0, 103.0)  # a warm-up is not timed: 1, 2 and 100 seconds

    clock = ticks()
    monkeypatch.setattr(timing, "CPU_BYTES", 4000)
    monkeypatch.setattr(timing, "RUNS", 3)
    monkeypatch.setattr(timing, "now", lambda device: next(clock))
    assert measure_bandwidth(CPU) == 2000


def test_a_meter_sees_what_was_taken_and_given_back() -> None:
    meter = MemoryMeter(CPU)
    meter.begin()
    held = torch.ones(2**25)  # 128 MiB
    del held
    rise = meter.rise()
    assert rise is None or 0.99 * 2**27 <= rise < 2**28  # the system counts some pages late
    meter.begin()
    again = meter.rise()
    assert again is None or again < 2**26
