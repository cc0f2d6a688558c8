"""A model whose blocks everything has passed: what is left in memory is one hidden state a token, ready for logits.

The hidden state after the last block is what a token's logits come from, and far smaller than they are (D, not V
numbers): so models are read one after another, and compared afterwards at the price of their heads.

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
    """A decoder whose streams have all gone through its blocks, ready for logits."""

    def __init__(
        self,
        decoder: Decoder,
        windows: dict[str, Tensor],
        packed: dict[str, list[Bucket]],
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
        self.buckets = {path: [(bucket, stream(bucket.ids_ST)) for bucket in found] for path, found in packed.items()}
        streams = [*self.windows.values(), *(s for found in self.buckets.values() for _, s in found)]

        def visit(block: Any) -> None:
            report(Event.EVALUATE, index=block.index, of=len(decoder), model=decoder.checkpoint.folder.name)

        forward(decoder, streams, visit)

    def logits(self, stream: Stream, rows: slice) -> Tensor:
        """Logits [B, T, V] float32 of the windows `rows`."""
        return self.decoder.logits(stream.ids_ST[rows], stream.hidden.read(rows)).float()
