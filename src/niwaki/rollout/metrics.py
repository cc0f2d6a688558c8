"""What the gateway says to Prometheus: counts and the state, read when asked for. No label comes from a request.

niwaki_rollout_requests{side="canary"} 120
"""

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from niwaki.rollout.controller import Controller

SIDES = ("stable", "canary", "fallback", "important", "shadow")


class _Counts(Collector):
    def __init__(self, controller: Controller) -> None:
        self.controller = controller

    def collect(self) -> Iterator[Metric]:
        """Every count of the roll-out that runs."""
        controller, requests, skipped = self.controller, Counter[str](), Counter[str]()
        for interval in controller.ledger.intervals:
            requests.update(interval.requests)
            skipped.update({why.partition(":")[0]: count for why, count in interval.skipped.items()})
        sides = GaugeMetricFamily("niwaki_rollout_requests", "answers of this roll-out by side", labels=["side"])
        for side in SIDES:
            sides.add_metric([side], requests[side])
        yield sides
        left = GaugeMetricFamily("niwaki_rollout_skipped", "what was left out of this roll-out", labels=["what"])
        for what, count in sorted(skipped.items()):
            left.add_metric([what], count)
        yield left
        yield GaugeMetricFamily("niwaki_rollout_share", "share of traffic of the canary", value=controller.share)
        yield GaugeMetricFamily("niwaki_rollout_number", "which roll-out it is", value=controller.state.id)
        for finding in controller.verdict.findings if controller.verdict else ():
            if finding.value is not None:
                yield GaugeMetricFamily(f"niwaki_rollout_{finding.signal}", "see niwaki rollout", value=finding.value)


def exposition(controller: Controller) -> bytes:
    """The page that Prometheus reads."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Counts(controller))
    return generate_latest(registry)
