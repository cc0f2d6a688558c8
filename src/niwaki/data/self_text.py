"""Text that a model writes itself: windows that are sampled after its start token, at temperature 1.

Such text needs no file, and has the mixture of subjects that the model was trained on. The end token ends a document
and another one follows, as in the windows of files. Sampling takes the next token from the inverse of the cumulative
distribution. Window w reads its own random numbers, which follow from the seed and w. So the first windows are the same
for any number of windows, and in batches of any size, up to the rounding of sums.

Windows are kept in the cache of the user (NIWAKI_CACHE, or XDG_CACHE_HOME/niwaki, or ~/.cache/niwaki), below
`self-text`, in files of CHUNK windows. What decides them names their folder: the files of the model, start token,
length, seed, device, and versions. One process at a time writes to a folder, so that several runs write a text once.

Cost: the whole model in memory with the keys and values of a batch. A batch takes one decode step per token.

Legend: S windows, B windows of a batch, T tokens per window, V vocabulary.

    ids_ST = self_windows("MODEL", (1,), samples=128, seq_len=512, seed=0, device="cpu", report=silent)
"""

import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from niwaki.config.events import Event, Report
from niwaki.errors import OutputError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.device import free_device_bytes
from niwaki.model.files import cache_folder, write_shard
from niwaki.model.hf import auto_class, plain_loading

LOCK = "lock"
CHUNK = 16  # windows per file of the cache
MAX_CHUNKS = {"cpu": 8, "cuda": 64}  # per batch
REPORT_STEPS = 32  # tokens a window grows between two reports
CACHE_COPIES = 3  # keys and values, and those of one block while they grow
LOGIT_BYTES = 32  # per token of the vocabulary and window: logits, probabilities and sums


def self_windows(
    model: str | Path, start: Sequence[int], *, samples: int, seq_len: int, seed: int, device: str, report: Report
) -> Tensor:
    """Return int64 windows [S, T] that the model writes after the tokens `start`, from the cache where it has them.

    The event `sample` reports the tokens `done`. Raises CheckpointError for a model that cannot be loaded.
    """
    chunks = -(-samples // CHUNK)
    folder = cache_folder("self-text") / _key(model, start, seq_len, seed, device)
    found = _found(folder, range(chunks), seq_len)
    decoder, total = None, 0
    while len(found) < chunks:
        with _alone(folder, report):
            found |= _found(folder, [chunk for chunk in range(chunks) if chunk not in found], seq_len)
            missing = [chunk for chunk in range(chunks) if chunk not in found]
            if not missing:
                break
            if decoder is None:
                total = len(missing) * CHUNK
                message = f"the model writes {total:,} windows of {seq_len} tokens itself (kept in {folder})"
                report(Event.WARNING, message=message)
                decoder = _load(model, device)
            part = missing[: _batch_chunks(decoder, seq_len)]
            numbers = [number for chunk in part for number in range(chunk * CHUNK, (chunk + 1) * CHUNK)]
            done = (total - len(missing) * CHUNK) * seq_len, total * seq_len
            ids_BT = _write(decoder, start, _uniform(numbers, seq_len, seed), done, report)
            for chunk, ids_ST in zip(part, ids_BT.split(CHUNK), strict=True):
                write_shard(_file(folder, chunk), {"ids": ids_ST.contiguous()})
                found[chunk] = ids_ST
    return torch.cat([found[chunk] for chunk in range(chunks)])[:samples].to(torch.int64)


@torch.no_grad()
def _write(decoder: Any, start: Sequence[int], uniform_BT: Tensor, done: tuple[int, int], report: Report) -> Tensor:
    """Return int32 windows [B, T]: the tokens that the numbers in [0, 1) choose, without the start."""
    count, tokens = uniform_BT.shape
    uniform_BT = uniform_BT.to(decoder.device)

    def choose(ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        """Leave one token per window: the one that its number falls on."""
        step = ids_BT.shape[1] - len(start)
        sums_BV = scores_BV.float().softmax(-1).cumsum(-1, dtype=torch.float64)
        wanted_B1 = uniform_BT[:, step, None] * sums_BV[:, -1:]
        chosen_B1 = torch.searchsorted(sums_BV, wanted_B1, right=True).clamp_(max=scores_BV.shape[1] - 1)
        if (step + 1) % REPORT_STEPS == 0 or step + 1 == tokens:
            report(Event.SAMPLE, done=done[0] + (step + 1) * count, of=done[1])
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, chosen_B1, 0.0)

    prompt_BK = torch.tensor([list(start)], device=decoder.device).expand(count, -1)
    ids_BT: Tensor = decoder.generate(
        prompt_BK, attention_mask=torch.ones_like(prompt_BK), do_sample=False, max_new_tokens=tokens,
        logits_processor=[choose], pad_token_id=start[-1],
    )  # fmt: skip
    return ids_BT[:, len(start) :].to(torch.int32).cpu()


def _uniform(numbers: Sequence[int], tokens: int, seed: int) -> Tensor:
    """Return random numbers [B, T] in [0, 1), float64: those of every window follow from the seed and its number."""
    rows = []
    for number in numbers:
        digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        rows.append(torch.rand(tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def _load(model: str | Path, device: str) -> Any:
    """Return the model, with documents that end without an end of the window."""
    from transformers import AutoConfig

    with plain_loading():
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
        decoder: Any = auto_class(config).from_pretrained(model, config=config, dtype=dtype, trust_remote_code=False)
    decoder.generation_config = type(decoder.generation_config)()  # no end token, penalty or limit of its own
    return decoder.to(device).eval()


def _batch_chunks(decoder: Any, tokens: int) -> int:
    """Return how many chunks of windows are written at once: as many as their keys and values leave room for."""
    config, device = decoder.config.get_text_config(), decoder.device
    width = 2 * int(config.num_hidden_layers) * int(config.hidden_size)
    heads, groups = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if heads and groups:
        width = width * groups // heads
    window_bytes = CACHE_COPIES * tokens * width * decoder.dtype.itemsize + LOGIT_BYTES * config.vocab_size
    free_bytes = free_device_bytes(device) if device.type == "cuda" else psutil.virtual_memory().available // 2
    chunks = int(0.8 * free_bytes / (CHUNK * window_bytes))
    return max(1, min(chunks, MAX_CHUNKS[device.type]))


def _key(model: str | Path, start: Sequence[int], seq_len: int, seed: int, device: str) -> str:
    """Return the name of the folder of windows: the hash of what decides them."""
    decides = {
        "model": Checkpoint.open(model).fingerprint(),
        "start": list(start),
        "seq_len": seq_len,
        "seed": seed,
        "device": torch.device(device).type,
        "versions": [version("torch"), version("transformers")],
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:24]


def _file(folder: Path, chunk: int) -> Path:
    return folder / f"{chunk:05d}.safetensors"


def _read(folder: Path, chunk: int, tokens: int) -> Tensor | None:
    """Return the windows of a chunk, None if the cache has none that can be used."""
    try:
        ids_ST = load_file(_file(folder, chunk))["ids"]
    except (OSError, SafetensorError, KeyError):
        return None
    return ids_ST if ids_ST.shape == (CHUNK, tokens) and ids_ST.dtype == torch.int32 else None


def _found(folder: Path, chunks: Iterable[int], tokens: int) -> dict[int, Tensor]:
    """Return the windows of the chunks that the cache has."""
    read = ((chunk, _read(folder, chunk, tokens)) for chunk in chunks)
    return {chunk: ids_ST for chunk, ids_ST in read if ids_ST is not None}


@contextmanager
def _alone(folder: Path, report: Report) -> Iterator[None]:
    """Hold the lock of a folder, and wait for another process that writes there. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}. Set NIWAKI_CACHE to another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(Event.WARNING, message="another process writes the same text: this one waits, and takes it over")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
