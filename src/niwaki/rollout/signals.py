"""Signals of a roll-out. A signal that `niwaki compare` measures too has the same name.

    error_rate             share of requests on which the canary failed and the dense model did not
    prefill_latency_ratio  time to the first byte of a stream / that of the dense model at the same time (median)
    decode_latency_ratio   time per generated token / that of the dense model at the same time (median)
    top1_agreement         share of the tokens of an answer where both find the same next token most likely (mean)
    perplexity_ratio       perplexity of the canary / of the dense model on the prompts (geometric mean over prompts)
    logprob_gap            log-probability of an answer by the canary − by the dense model, nats per token (mean)

The first three come from every request, the last three from audited ones. Offline the weight of a document is its
number of tokens. Here every request has the same weight. Values are scaled to 0..1 (`scaled`). Log-ratios are clipped
at a factor of e, latencies at 16.

    SIGNALS["top1_agreement"].scaled(0.9)  ->  0.9
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Signal:
    """Signal and its scale. `limit`: the side of its limit. `centre`: the statistic that is tested.

    `proved`: if True, a wider step needs certainty that the limit is kept. If False, it only needs no alarm.
    """

    unit: str
    limit: Literal["max", "min"]
    centre: Literal["mean", "median"]
    proved: bool
    scaled: Callable[[float], float]
    value: Callable[[float], float]


def _same(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _log_scaled(cutoff: float) -> Callable[[float], float]:
    def scaled(ratio: float) -> float:
        return _same((math.log(max(ratio, 1e-12)) / cutoff + 1) / 2)

    return scaled


def _log_value(cutoff: float) -> Callable[[float], float]:
    return lambda scaled: math.exp((2 * scaled - 1) * cutoff)


def _ratio(centre: Literal["mean", "median"], cutoff: float, *, proved: bool) -> Signal:
    return Signal("", "max", centre, proved, _log_scaled(cutoff), _log_value(cutoff))


SIGNALS: dict[str, Signal] = {
    "error_rate": Signal("", "max", "mean", False, _same, _same),
    "prefill_latency_ratio": _ratio("median", math.log(16), proved=False),
    "decode_latency_ratio": _ratio("median", math.log(16), proved=False),
    "top1_agreement": Signal("", "min", "mean", True, _same, _same),
    "perplexity_ratio": _ratio("mean", 1.0, proved=True),
    "logprob_gap": Signal("nats/token", "max", "mean", True, lambda v: _same((v + 1) / 2), lambda v: 2 * v - 1),
}
QUALITY = tuple(name for name, signal in SIGNALS.items() if signal.proved)
