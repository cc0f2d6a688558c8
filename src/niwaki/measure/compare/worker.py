"""A process with one model that works on request.

So memory and loading time are those of this model alone. Two models can take turns at full speed, because the idle one
only waits for a line on its input. Two processes run at the same time, the dense model and one candidate. So a
comparison needs the memory of both.

A request is one line of JSON, and so is the answer: {"error": text} for a failure. A request without `ids` asks for the
peak memory.

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
    """Client of the process of one model, a context manager. `loaded`: time and memory of loading."""

    def __init__(self, model: str | Path, device: str) -> None:
        self.model = str(model)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from niwaki.measure.compare.worker import main; main()", self.model, device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True, encoding="utf-8",
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
            self._process.stdin.close()  # the process ends at the end of its input
            self._process.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._stderr.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises MeasuringError if the model or its process fails."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `_answer` raises with the reason
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise MeasuringError(
                f"{self.model}: its process ended ({self._exit_reason()}): is there memory for two models?"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise MeasuringError(f"{self.model}: {answer['error']}")
        return answer

    def _exit_reason(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return f"exit {code}" + (f", {lines[-1][:200]}" if lines else "")


def continue_greedily(
    model: Any, ids: Sequence[int], new_tokens: int, stop: int | None = None
) -> tuple[list[int], tuple[float, float]]:
    """Return the tokens that the model decodes after a prompt, up to `stop`, and seconds of (prefill, decode)."""
    import torch
    from transformers import DynamicCache

    ids_1T = torch.tensor([list(ids)], device=model.device)
    cache, decoded = DynamicCache(config=model.config), []
    with torch.no_grad():
        begin = _now(model)
        logits = model(input_ids=ids_1T, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        prefilled = _now(model)
        for _ in range(new_tokens):
            token_11 = logits[:, -1:].argmax(-1)
            decoded.append(token_11)
            if stop is not None and int(token_11) == stop:
                break
            logits = model(input_ids=token_11, past_key_values=cache, use_cache=True).logits
        end = _now(model)
    return [int(token) for token in decoded], (prefilled - begin, end - prefilled)


def serve(model_name: str, device: str, answer: Callable[[dict[str, Any]], None]) -> None:
    """Load the model, answer with time and memory of loading, then answer requests until the input ends."""
    import psutil
    import torch

    from niwaki.model.checkpoint import Checkpoint
    from niwaki.model.device import peak_rss_bytes, pick_device
    from niwaki.model.hf import build_skeleton
    from niwaki.runtime.load import load_checkpoint

    process, on_cuda = psutil.Process(), pick_device(device).type == "cuda"
    checkpoint = Checkpoint.open(model_name)
    build_skeleton(checkpoint.config, torch.float32)  # imports are not part of loading
    torch.zeros(1, device=pick_device(device))  # nor is the creation of the GPU context
    before = process.memory_info().rss
    begin = time.perf_counter()
    model = load_checkpoint(checkpoint, device=device)
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
        ids, (prefill, decode) = continue_greedily(model, request["ids"], request["new_tokens"], request.get("stop"))
        answer({"ids": ids, "prefill_seconds": prefill, "decode_seconds": decode})


def _now(model: Any) -> float:
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def main() -> None:
    """Run the process. Answers go to the original stdout; anything that a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        serve(sys.argv[1], sys.argv[2], answer)
    except (NiwakiError, RuntimeError, ValueError, OSError) as error:
        answer({"error": str(error).strip().split("\n")[0]})
