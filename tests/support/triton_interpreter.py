"""Triton's kernels without a GPU: functions of the tests here, run where Triton interprets what it would compile.

Whether it does is decided when Triton is imported, so that needs a process of its own. One for all tests: it imports
torch and Triton once (some seconds) and forks for every function, whose changes to modules end with it.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path
from types import FunctionType

HERE = Path(__file__).parent


@cache
def _server() -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(HERE.parents[0]), str(HERE.parents[1])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.Popen(
        [sys.executable, "-c", "from support.triton_interpreter import serve; serve()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def interpreted(name: str, module: str) -> None:
    """Runs a function of a test file; fails with its traceback."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(f"{module} {name}\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, f"the interpreting process ended ({server.poll()})"
    assert json.loads(answer) == "done", json.loads(answer)


def serve() -> None:
    """Answers every line `MODULE FUNCTION` with "done" or a traceback, until there are no more."""
    import triton  # noqa: F401 (children have it then)

    import niwaki.runtime.linear  # noqa: F401

    patch_once()
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            with os.fdopen(writing, "w") as answer:
                answer.write(_run(*line.split()))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answer:
            found = answer.read()
        ended = os.waitpid(child, 0)[1]
        print(json.dumps(found or f"{line.strip()} ended with status {ended}"), flush=True)


def _run(module: str, name: str) -> str:
    try:
        getattr(importlib.import_module(module), name)()
    except BaseException:
        return traceback.format_exc()
    return "done"


def patch_once() -> None:
    """Triton's language is made interpretable once a launch, not again in every function that a kernel calls.

    The interpreter looks through all members of its modules for every such call and finds nothing left to replace:
    44% of a profiled launch of `triton_rows` (Triton 3.9.0).
    """
    from triton import language
    from triton.runtime import interpreter

    real, done = interpreter._patch_lang, set()

    def patch(fn: FunctionType) -> interpreter._LangPatchScope:
        seen = fn.__globals__.values()
        languages = tuple(any(value is module for value in seen) for module in (language, language.core))
        if languages in done:
            return interpreter._LangPatchScope()  # nothing to undo
        first = not done
        scope = real(fn)
        done.add(languages)
        if first:  # that of the launch, which ends by restoring it
            restore = scope.restore

            def ended() -> None:
                restore()
                done.clear()

            scope.restore = ended
        return scope

    interpreter._patch_lang = patch
