"""Arithmetic of gradients: the same bytes for the same seed, and fast products on a GPU."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

Result = TypeVar("Result")


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Compute float32 products on a GPU with factors rounded to TF32 (10 bits), which is several times as fast.

    Only gradients are made so: a random batch changes them far more. What is measured and stored stays in float32.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def run_deterministically(work: Callable[[], Result]) -> Result:
    """Run `work` so that the same seed gives the same bytes.

    By default, attention's backward on CUDA adds in any order. An operation without a deterministic form runs as it
    is; torch warns and names it.
    """
    try:
        with _deterministic(warn_only=False):
            return work()
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
    with _deterministic(warn_only=True):
        return work()


@contextlib.contextmanager
def _deterministic(*, warn_only: bool) -> Iterator[None]:
    """Set torch's deterministic algorithms, without cuDNN's attention, which has no such setting.

    With `warn_only`, torch keeps attention that adds in any order.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses
    before = torch.are_deterministic_algorithms_enabled()
    before_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch.use_deterministic_algorithms(before, warn_only=before_warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
