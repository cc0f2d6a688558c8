"""The names of everything a comparison measures: one list for the JSON, gates, JUnit, tables and later monitoring.

A metric compares a candidate with the dense model on the same tokens, questions or rounds. The names are stable: a
gate is `max_` or `min_` before one of them, and what watches a model in production reports under the same names.

    METRICS["kl"].unit  ->  "nats/token"
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """What a name means. `limit`: the side that a gate can limit; `needs`: the evidence it is measured from."""

    unit: str
    limit: Literal["max", "min"]
    needs: Literal["data", "tasks", "speed", "file"]
    meaning: str


METRICS: dict[str, Metric] = {
    "perplexity_ratio": Metric("", "max", "data", "perplexity of the candidate / that of the dense model"),
    "kl": Metric("nats/token", "max", "data", "mean KL(dense‖candidate) of the next-token distributions"),
    "top1_agreement": Metric("", "min", "data", "share of tokens where both find the same next token most likely"),
    "accuracy_loss": Metric("", "max", "tasks", "accuracy of the dense model − that of the candidate, same questions"),
    "accuracy_norm_loss": Metric("", "max", "tasks", "the same for likelihoods divided by characters"),
    "prefill_latency_ratio": Metric("", "max", "speed", "time for a prompt / that of the dense model, in turns"),
    "decode_latency_ratio": Metric("", "max", "speed", "time for a written token / that of the dense model, in turns"),
    "bytes": Metric("bytes", "max", "file", "weight files of the candidate, what niwaki runs beside them included"),
    "bytes_ratio": Metric("", "max", "file", "bytes of the candidate / those of the dense model"),
}
