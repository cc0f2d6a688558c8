"""Using transformers' weight loader as a part of our own work."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"


@contextmanager
def plain_loading() -> Iterator[None]:
    """transformers' loader without its progress bar and its threads.

    The tensors are in memory already; its threads would only spread them over more heaps.
    """
    from transformers.utils import logging

    shown, threads = logging.is_progress_bar_enabled(), os.environ.get(_NO_THREADS)
    logging.disable_progress_bar()
    os.environ[_NO_THREADS] = "1"
    try:
        yield
    finally:
        if threads is None:
            os.environ.pop(_NO_THREADS, None)
        else:
            os.environ[_NO_THREADS] = threads
        if shown:
            logging.enable_progress_bar()
