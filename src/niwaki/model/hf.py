"""Using other libraries as a part of our own work: without what they say and do on the side."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"


@contextmanager
def plain_loading() -> Iterator[None]:
    """transformers' loader without its progress bar and its threads.

    The tensors are in memory already; its threads would only spread them over more heaps.
    """
    from transformers.utils import logging as shown_by_transformers

    shown, threads = shown_by_transformers.is_progress_bar_enabled(), os.environ.get(_NO_THREADS)
    shown_by_transformers.disable_progress_bar()
    os.environ[_NO_THREADS] = "1"
    try:
        yield
    finally:
        if threads is None:
            os.environ.pop(_NO_THREADS, None)
        else:
            os.environ[_NO_THREADS] = threads
        if shown:
            shown_by_transformers.enable_progress_bar()


@contextmanager
def only_errors(name: str) -> Iterator[None]:
    """A library's logger without its warnings, where what it warns of is checked or does not matter."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
