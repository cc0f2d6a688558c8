"""Write the locks: every package that an installation downloads, with the SHA-256 of each of its files on PyPI.

    python dependencies/lock.py    # needs uv and PyPI

`build.lock` is what compiles the kernels, `runtime.lock` what niwaki needs, `dev.lock` what tests and linters need too.
The versions are those of constraints.txt. torch is left out, with what a CUDA build of it needs (nvidia-*, cuda-*). CI
installs the CPU build, which PyPI does not have. pip prefers a file whose index gives a hash. So with both hashes in a
lock it took the CUDA build, which is gigabytes larger. The Makefile installs torch by its version alone.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HERE = ROOT / "dependencies"
BUILD = ("scikit-build-core>=0.11", "nanobind>=2.4", "cmake>=3.20", "ninja", "setuptools", "wheel")
LOCKS = {"build": None, "runtime": (), "dev": ("--extra", "dev")}
LEFT_OUT = re.compile(r"(nvidia|cuda)-|torch==")
TITLE = "# Written by `make lock` (dependencies/lock.py). Installed with --require-hashes --no-deps.\n"


def main() -> None:
    """Write all locks."""
    for name, extras in LOCKS.items():
        (HERE / f"{name}.lock").write_text(TITLE + _locked(extras), encoding="utf-8")


def _locked(extras: tuple[str, ...] | None) -> str:
    """Return the requirements with hashes of the package with `extras`, or of what builds it."""
    with tempfile.TemporaryDirectory() as folder:
        source, found = ROOT / "pyproject.toml", Path(folder) / "found"
        if extras is None:
            source = Path(folder) / "build.in"
            source.write_text("\n".join(BUILD) + "\n", encoding="utf-8")
        command = [
            sys.executable, "-m", "uv", "pip", "compile", str(source), *(extras or ()), "-c", "constraints.txt",
            "--universal", "--python-version", "3.11", "--generate-hashes", "--no-annotate", "--no-header", "--quiet",
            "--output-file", str(found),
        ]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        parts = re.split(r"^(?=\S)", found.read_text(encoding="utf-8"), flags=re.M)
        return "".join(part for part in parts if not LEFT_OUT.match(part))


if __name__ == "__main__":
    main()
