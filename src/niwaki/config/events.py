"""Events that a job reports while it works, and the function that receives them.

`report(Event.BLOCK, index=0, of=32, replayed=False, seconds=1.2)` calls a `Report`. A compression also appends the
event to events.jsonl, with the same name and fields. An `Event` is a string: a caller may compare it with "block".
"""

from enum import StrEnum
from typing import Any, Protocol


class Event(StrEnum):
    """Names of all events; the comment states the fields."""

    START = "start"  # blocks, method, target
    COMPLETE = "complete"  # out: the result was complete before, nothing is done
    WARNING = "warning"  # message
    SAMPLE = "sample"  # done, of: tokens of calibration text that the model writes
    SCAN = "scan"  # index, of: dense blocks that were measured
    ALLOCATION = "allocation"  # the field `allocation` of run.json
    # The two texts below that differ from their names stand in the events.jsonl of old results.
    CANDIDATE = "trial"  # shape, loss: a pruned shape that was evaluated
    INPUTS = "inputs"  # index, of: blocks whose inputs were stored
    GRADIENTS = "gradients"  # index, of: blocks of the backward pass
    TRACES = "traces"  # samples, bytes: size of the traces of a contextual method
    ACTIVATIONS = "activations"  # index, of: blocks whose activations were traced
    CANDIDATE_BLOCK = "trying"  # index, of: blocks of an evaluation of candidates
    BLOCK = "block"  # index, of, replayed, seconds: a block that was compressed or replayed
    SAVED = "saved"  # part: a part that is on the disk and in the journal
    DONE = "done"  # seconds, out
    EVALUATE = "evaluate"  # index, of, model
    COMPARE = "compare"  # done, of, model: windows that were scored
    MEASURE = "measure"  # done, of: rounds of a measurement of speed
    EXPORT = "export"  # index, of: parts that were exported
    RECOVER = "recover"  # done, of, heldout_loss: training steps
    BENCH = "bench"  # done, of, variant: variants that were benchmarked


class Report(Protocol):
    """Receiver of events: a function of a name and keyword arguments."""

    def __call__(self, event: str, **fields: Any) -> None:
        """Take one event."""


def silent(event: str, **fields: Any) -> None:
    """Ignore an event."""
