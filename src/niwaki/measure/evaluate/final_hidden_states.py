"""Hidden states after the last block, one per token, from which logits are computed on demand.

They are far smaller than logits (D, not V numbers). So models are read one after another, and a later comparison only
costs their LM heads.

Legend: B sequences, T tokens, V vocabulary, D hidden size.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from niwaki.compression.walk import forward
from niwaki.config.events import Event, Report
from niwaki.data.stream import Stream
from niwaki.measure.evaluate.tasks import Bucket
from niwaki.model.decoder import Decoder


class FinalHiddenStates:
    """Hidden states of texts and task sequences after the last block of a decoder."""

    def __init__(
        self,
        decoder: Decoder,
        windows: dict[str, Tensor],
        sequences: dict[str, list[Bucket]],
        folder: Path,
        report: Report,
    ) -> None:
        self.decoder = decoder
        folder.mkdir()
        number = 0

        def stream(ids_ST: Tensor) -> Stream:
            nonlocal number
            number += 1
            return Stream(decoder, ids_ST, folder=folder, name=f"stream-{number}")

        self.windows = {path: stream(ids_ST) for path, ids_ST in windows.items()}
        self.buckets = {path: [(bucket, stream(bucket.ids_ST)) for bucket in own] for path, own in sequences.items()}
        streams = [*self.windows.values(), *(s for own in self.buckets.values() for _, s in own)]

        def visit(block: Any) -> None:
            report(Event.EVALUATE, index=block.index, of=len(decoder), model=decoder.checkpoint.folder.name)

        forward(decoder, streams, visit)

    def logits(self, stream: Stream, rows: slice) -> Tensor:
        """Return the logits [B, T, V], float32, of the windows `rows`."""
        return self.decoder.logits(stream.ids_ST[rows], stream.hidden.read(rows)).float()
