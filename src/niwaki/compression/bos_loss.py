"""Check of a model that runs without its beginning-of-text token: the loss of a few windows with the token and without.

Both losses are means over the same predicted tokens, those of the text after its first one. A loss that falls by more
than MAX_FALL shows that the model was trained with the token, and a warning says so.

Cost: a forward of 2 × WINDOWS windows of TOKENS tokens. An evaluation runs them beside its own windows.

    warn_without_bos(decoder, windows_ST, find_bos(tokenizer, "auto"), report)

Legend: S windows, T tokens, K tokens of the beginning.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from niwaki.compression.backward import next_token_losses
from niwaki.compression.walk import forward
from niwaki.config.events import Event, Report
from niwaki.data.bos import Bos
from niwaki.data.hidden_states import HiddenStates
from niwaki.data.stream import Stream
from niwaki.model.decoder import Decoder

WINDOWS, TOKENS = 4, 128
MAX_FALL = 0.25
WITHOUT, WITH = "without the beginning-of-text token", "with the beginning-of-text token"


def bos_windows(windows_ST: Tensor, bos: Bos, positions: int | None) -> dict[str, Tensor]:
    """Return a few windows WITHOUT the token and WITH it. Return {} if it is on, or if there is none."""
    tokens = TOKENS if positions is None else min(TOKENS, positions - len(bos.unused))
    text_ST = windows_ST[:WINDOWS, :tokens]
    if not bos.unused or text_ST.shape[1] < 2:
        return {}
    return {WITHOUT: text_ST, WITH: Bos(bos.unused).begin_windows(text_ST)}


def warn_of_losses(decoder: Decoder, streams: Mapping[str, HiddenStates], bos: Bos, report: Report) -> None:
    """Warn if the loss falls with the token. `streams` hold the windows of `bos_windows` after the last block."""
    if not streams:
        return
    without, with_bos = _mean_loss(decoder, streams[WITHOUT], 0), _mean_loss(decoder, streams[WITH], len(bos.unused))
    if with_bos < (1 - MAX_FALL) * without:
        report(
            Event.WARNING,
            message=f"{decoder.checkpoint.folder}: the loss on the first windows falls from {without:.3f} to "
            f"{with_bos:.3f} with the beginning-of-text token {bos.name}, which is off: pass --bos on",
        )


def warn_without_bos(decoder: Decoder, windows_ST: Tensor, bos: Bos, report: Report) -> None:
    """Run a few windows through the model, and warn if the loss falls with the token. Read every block once."""
    probes = bos_windows(windows_ST, bos, decoder.positions)
    if not probes:
        return
    streams = {name: Stream(decoder, ids_ST, name=name) for name, ids_ST in probes.items()}
    forward(decoder, list(streams.values()))
    warn_of_losses(decoder, streams, bos, report)
    decoder.release_outer()


def _mean_loss(decoder: Decoder, stream: HiddenStates, skip: int) -> float:
    """Return the mean loss of the predicted tokens after the first `skip`."""
    losses = []
    with torch.no_grad():
        for row in range(len(stream)):
            rows = slice(row, row + 1)
            losses.append(next_token_losses(decoder, stream.ids_ST[rows], stream.hidden.read(rows))[:, skip:])
    return float(torch.cat(losses).double().mean())
