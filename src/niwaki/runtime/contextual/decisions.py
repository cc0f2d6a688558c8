"""What a contextual model did with a batch of sequences, and why."""

from dataclasses import dataclass, field

# A part of the weights wrote; all of them, for the prompt lay beyond a limit of the gate or the batch needed most of
# them; no look was possible; the prompt was too short for one, or nothing was written behind it.
DECISIONS = ("sparse", "deviation", "margin", "batch", "unsupported", "unread")


@dataclass
class Record:
    """What was done for one batch of sequences: how the prompt was answered, and what every look decided."""

    sequences: int
    prompt_tokens: int
    sparse_tokens: int = 0
    dense_tokens: int = 0
    skipped_frac: list[float] = field(default_factory=list)
    deviation: list[float] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    kept: list[dict[str, list[int]]] = field(default_factory=list)
    dense_because: str = ""
    note: str = ""
    verified: dict[str, float] = field(default_factory=dict)

    def count(self, tokens: int, *, sparse: bool) -> None:
        """Tokens of each sequence that were written since."""
        if sparse:
            self.sparse_tokens += tokens
        else:
            self.dense_tokens += tokens

    @property
    def decision(self) -> str:
        """How the last look ended: one of `DECISIONS`, for those who count."""
        if not self.dense_because:
            return "sparse" if self.skipped_frac else "unread"
        if len(self.deviation) > len(self.margin):
            return "deviation"
        if len(self.margin) > len(self.skipped_frac):
            return "margin"
        if len(self.skipped_frac) > len(self.kept):
            return "batch"
        return "unsupported"
