"""One model in a process of its own, which works only when it is told to.

Memory and loading time are then those of this model alone, and two models can take turns at full speed: the one that
waits only waits for a line on its input. Two processes live at once, that of the dense model and that of one
candidate, so a comparison needs the memory of both.

A request is a line of JSON, the answer another one, {"error": text} if it failed. A request without `ids` asks for the
most memory so far.

    with Worker("OUT", "cpu") as worker:
        worker.ask(ids=[1, 2, 3], new_tokens=8)["decode_seconds"]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from niwaki.errors import MeasuringError, NiwakiError


class Worker:
    """The process of one model, seen from outside; `loaded` is what loading it took. Use as a context manager."""

    def __init__(self, model: str | Path, device: str) -> None:
        self.model = str(model)
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from niwaki.measure.compare.worker import main; main()", self.model, device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._noise, text=True, encoding="utf-8",
        )  # fmt: skip
        self.loaded: dict[str, Any] = {}

    def __enter__(self) -> "Worker":
        try:
            self.loaded = self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()  # the end of its input ends it
            self._process.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._noise.close()

    def ask(self, **given: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer. Raises MeasuringError when the model or its process fails."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(given) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer tells why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise MeasuringError(
                f"{self.model}: its process ended ({self._last_words()}): is there room for two models?"
            )
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise MeasuringError(f"{self.model}: {found['error']}")
        return found

    def _last_words(self) -> str:
        code = self._process.wait()
        self._noise.seek(0)
        words = self._noise.read().decode(errors="replace").strip().splitlines()
        return f"exit {code}" + (f", {words[-1][:200]}" if words else "")


def continue_greedily(
    model: Any, ids: Sequence[int], new_tokens: int, stop: int | None = None
) -> tuple[list[int], tuple[float, float]]:
    """The tokens that the model writes behind a prompt, up to `stop`, and the seconds (prompt, writing)."""
    import torch
    from transformers import DynamicCache

    ids_1T = torch.tensor([list(ids)], device=model.device)
    cache, written = DynamicCache(config=model.config), []
    with torch.no_grad():
        begin = _now(model)
        logits = model(input_ids=ids_1T, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        read = _now(model)
        for _ in range(new_tokens):
            token_11 = logits[:, -1:].argmax(-1)
            written.append(token_11)
            if stop is not None and int(token_11) == stop:
                break
            logits = model(input_ids=token_11, past_key_values=cache, use_cache=True).logits
        end = _now(model)
    return [int(token) for token in written], (read - begin, end - read)


def serve(model_name: str, device: str, answer: Callable[[dict[str, Any]], None]) -> None:
    """Loads the model, answers with what that took, and then one request after another until the input ends."""
    import psutil
    import torch

    from niwaki.model.checkpoint import Checkpoint
    from niwaki.model.device import peak_rss_bytes, pick_device
    from niwaki.model.hf import build_skeleton
    from niwaki.runtime.load import load

    process, on_cuda = psutil.Process(), pick_device(device).type == "cuda"
    build_skeleton(Checkpoint.open(model_name).config, torch.float32)  # code that is imported is no part of a model
    torch.zeros(1, device=pick_device(device))  # nor is the context of a GPU
    before = process.memory_info().rss
    begin = time.perf_counter()
    model = load(model_name, device=device)
    seconds = _now(model) - begin
    answer(
        {
            "load_seconds": seconds,
            "before_bytes": before,
            "loaded_bytes": process.memory_info().rss,
            "device_loaded_bytes": torch.cuda.memory_allocated(model.device) if on_cuda else None,
            "threads": torch.get_num_threads(),
        }
    )
    for line in sys.stdin:
        request = json.loads(line)
        if "ids" not in request:
            peak = torch.cuda.max_memory_allocated(model.device) if on_cuda else None
            answer({"peak_bytes": peak_rss_bytes(), "device_peak_bytes": peak})
            continue
        ids, (read, wrote) = continue_greedily(model, request["ids"], request["new_tokens"], request.get("stop"))
        answer({"ids": ids, "prefill_seconds": read, "decode_seconds": wrote})


def _now(model: Any) -> float:
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def main() -> None:
    """What the process runs. Answers go to what was the output; whatever else a library prints goes to the errors."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    try:
        serve(sys.argv[1], sys.argv[2], answer)
    except (NiwakiError, RuntimeError, ValueError, OSError) as error:
        answer({"error": str(error).strip().split("\n")[0]})
