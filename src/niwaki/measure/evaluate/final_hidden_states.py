"""Hidden states after the last block, one per token, from which logits are computed on demand.

They are far smaller than logits (D, not V numbers). So models are read one after another, and a later comparison only
costs their LM heads.

Logits are made in slices of positions within the decoder's `logit_bytes` (`model.logits`).

Legend: S windows, T tokens, N positions, V vocabulary, D hidden size.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niwaki.compression.bos_loss import warn_of_losses
from niwaki.compression.walk import forward
from niwaki.config.events import Event, Report
from niwaki.data.bos import Bos
from niwaki.data.hidden_states import HiddenStates
from niwaki.data.stream import Stream
from niwaki.measure.evaluate.tasks import Bucket
from niwaki.model.decoder import Decoder
from niwaki.model.logits import logits_of_part


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

        every = [*windows.values(), *(bucket.ids_ST for own in sequences.values() for bucket in own)]
        tokens = sum(ids_ST.numel() for ids_ST in every)

        def stream(ids_ST: Tensor) -> Stream:
            nonlocal number
            number += 1
            return Stream(decoder, ids_ST, folder=folder, name=f"stream-{number}", total_tokens=tokens)

        texts = {path: stream(ids_ST) for path, ids_ST in windows.items()}
        self.windows: dict[str, HiddenStates] = dict(texts)
        self.buckets = {path: [(bucket, stream(bucket.ids_ST)) for bucket in own] for path, own in sequences.items()}
        streams = [*texts.values(), *(s for own in self.buckets.values() for _, s in own)]

        def visit(block: Any) -> None:
            report(Event.EVALUATE, index=block.index, of=len(decoder), model=decoder.checkpoint.folder.name)

        if streams:
            forward(decoder, streams, visit)

    def warn_of_bos(self, probes: Collection[str], bos: Bos, report: Report) -> None:
        """Warn if the loss of the windows named `probes` falls with the beginning-of-text token, which is off."""
        warn_of_losses(self.decoder, {name: self.windows[name] for name in probes}, bos, report)

    def logits(self, stream: HiddenStates, row: int, part: slice) -> Tensor:
        """Return the logits [N, V], float32, of the positions `part` of one window."""
        rows = slice(row, row + 1)
        x_1TD = stream.hidden.read(rows)
        return logits_of_part(self.decoder.logits, stream.ids_ST[rows], x_1TD, part).float()

    def logprobs(self, stream: Stream, places_N: Tensor, wanted_N: Tensor) -> Tensor:
        """Return the log-probability [N], float32, of the token `wanted` after each place of the flattened windows."""
        ids_N, x_ND = stream.ids_ST.flatten(), stream.hidden.store_STD.flatten(0, 1)
        values: list[Tensor] = []
        for part in self.decoder.position_slices(len(places_N)):
            places = places_N[part]
            x_N1D = x_ND[places.to(x_ND.device)].to(self.decoder.device)[:, None]
            logprobs_NV = self.decoder.logits(ids_N[places, None], x_N1D)[:, 0].float().log_softmax(-1)
            values.append(logprobs_NV.gather(1, wanted_N[part, None].to(logprobs_NV.device))[:, 0].cpu())
            del logprobs_NV  # before the next slice is made
        return torch.cat(values)

    def window_parts(self, stream: HiddenStates) -> list[slice]:
        """Cut the positions of one window into slices whose logits fit the budget."""
        return self.decoder.position_slices(stream.ids_ST.shape[1])
