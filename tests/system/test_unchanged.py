"""The proof that behaviour is the recorded one: a part of `unchanged.py`, in a process with one thread."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("unchanged.py")


def test_the_quick_cases_agree_with_the_record() -> None:
    """Compare hashes where torch and the CPU are those of the record, else only names and counts."""
    line = [sys.executable, str(SCRIPT), "--quick", "--counts"]
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
