"""Names of all metrics of a comparison: one list for the JSON, gates, JUnit and tables.

A metric compares a candidate with the dense model on the same tokens, questions or rounds. The names are stable: a gate
is `max_` or `min_` and one of them. The roll-out has a list of its own (`niwaki.rollout.signals`). A signal that a
comparison measures too has the same name there.

    METRICS["kl"].unit  ->  "nats/token"
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One metric. `limit`: the side that a gate limits; `needs`: the inputs that it is measured on.

    `form`: how people read a value. `no_difference`: the value of a candidate that equals the dense model; bytes have
    0, so that a margin is a share of them.
    """

    unit: str
    limit: Literal["max", "min"]
    needs: Literal["data", "tasks", "speed", "file"]
    form: Literal["number", "percent", "bytes"]
    no_difference: float
    meaning: str

    @property
    def exact(self) -> bool:
        """Return whether the value is counted, and has no interval."""
        return self.needs == "file"


METRICS: dict[str, Metric] = {
    "perplexity_ratio": Metric(
        "", "max", "data", "number", 1.0, "perplexity of the candidate / that of the dense model"
    ),
    "kl": Metric(
        "nats/token", "max", "data", "number", 0.0, "mean KL(dense‖candidate) of the next-token distributions"
    ),
    "top1_agreement": Metric(
        "", "min", "data", "percent", 1.0, "share of tokens with the same most likely next token for both"
    ),
    "accuracy_loss": Metric(
        "", "max", "tasks", "percent", 0.0, "accuracy of the dense model − that of the candidate, same questions"
    ),
    "accuracy_norm_loss": Metric("", "max", "tasks", "percent", 0.0, "the same with likelihoods divided by characters"),
    "prefill_latency_ratio": Metric(
        "", "max", "speed", "number", 1.0, "prefill time of a prompt / that of the dense model, in turns"
    ),
    "decode_latency_ratio": Metric(
        "", "max", "speed", "number", 1.0, "decode time of a token / that of the dense model, in turns"
    ),
    "bytes": Metric(
        "bytes", "max", "file", "bytes", 0.0, "weight files of the candidate, with the predictor of a contextual one"
    ),
    "bytes_ratio": Metric("", "max", "file", "number", 0.0, "bytes of the candidate / those of the dense model"),
}
