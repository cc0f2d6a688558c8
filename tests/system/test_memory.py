"""Peak memory does not grow with the number of blocks."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from support.models import tiny_llama, write_texts


def peak_rss_bytes(model: Path, text: Path, out: Path) -> int:
    """Of a process of its own, as its run.json says."""
    command = [
        sys.executable, "-m", "niwaki.cli", "compress", str(model), str(out), "--method", "wanda", "--target", "0.5",
        "--calibration", str(text), "--samples", "8", "--seq-len", "16", "--device", "cpu",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return int(json.loads((out / "niwaki/run.json").read_text())["peak_rss_bytes"])


def test_sixteen_blocks_take_the_memory_of_four(tmp_path: Path) -> None:
    """One block is 13 MB in float32: keeping each would add 155 MB, a quarter of the process. Peaks vary by 12 %."""
    text = write_texts(tmp_path / "text.jsonl")
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "dtype": torch.bfloat16}
    peaks = []
    for blocks in (4, 16):
        model = tiny_llama(tmp_path / f"model-{blocks}", blocks=blocks, **shape)
        peaks.append(peak_rss_bytes(model, text, tmp_path / f"out-{blocks}"))
    assert abs(peaks[1] / peaks[0] - 1) < 0.15
