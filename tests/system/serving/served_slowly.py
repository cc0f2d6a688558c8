"""`niwaki serve` for tests: a slow model, an engine that can be killed, a log of every level.

    REACH_TOKEN_S=0.05 python -m tests.system.serving.served_slowly serve MODEL --port 8000

`REACH_TOKEN_S`: extra seconds for every token, read or written. SIGUSR1 ends the thread of the engine. `REACH_LOG`: log
messages of every level.
"""

import ctypes
import logging
import os
import signal
import threading
import time
from typing import Any

from niwaki.cli.app import main
from niwaki.serve import server


def load_slowly(*args: Any, **settings: Any) -> Any:
    """Load the model and slow it down."""
    model = load(*args, **settings)
    token_s = float(os.environ.get("REACH_TOKEN_S", "0"))

    def wait(_model: Any, _args: Any, given: Any) -> None:
        time.sleep(token_s * given["input_ids"].shape[1])

    model.register_forward_pre_hook(wait, with_kwargs=True)
    return model


def kill_engine(*_: Any) -> None:
    """Raise SystemExit in the thread of the engine."""
    for thread in threading.enumerate():
        if thread.name == "niwaki-engine" and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


def log_everything(**settings: Any) -> None:
    """Configure the log for every level."""
    configure(**{**settings, "level": 1})


load, configure = server.load_checkpoint, logging.basicConfig
if __name__ == "__main__":
    server.load_checkpoint = load_slowly
    if "REACH_LOG" in os.environ:
        logging.basicConfig = log_everything  # type: ignore[assignment]
    signal.signal(signal.SIGUSR1, kill_engine)
    main()
