"""The command line as a user meets it: exit codes, one-line errors, nothing written."""

import errno
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import niwaki
from niwaki.cli.app import without_secrets
from niwaki.compression.run_record import read_lines
from niwaki.config.recipe import Calibration, Recipe
from support.models import run, tiny_llama, write_texts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("cli") / "model")


def compress(model: Path, out: Path, text: Path, *more: object) -> list[object]:
    return [
        "compress", model, out, "--method", "wanda", "--target", "0.5", "--calibration", text,
        "--samples", 4, "--seq-len", 16, "--device", "cpu", *more,
    ]  # fmt: skip


def test_python_runs_the_package_as_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "niwaki", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("niwaki ")


def test_all_public_functions_are_listed_before_they_are_imported() -> None:
    code = "import sys, niwaki; assert {*niwaki.__all__} <= {*dir(niwaki)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_note_says_how_many_blocks_it_is_about(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Learn with steps too small to change anything, so that no block gains."""
    text, out = write_texts(tmp_path / "text.jsonl"), tmp_path / "out"
    given = compress(model, out, text, "--set", "rate_frac=1e-30", "--set", "rounds=1", "--set", "samples=2")
    given[4] = "wandapp"
    code, _, error = run(capsys, *given)
    assert code == 0 and "its start was kept (" in error
    assert f"of {len({line.block for line in read_lines(out)})} blocks, see" in " ".join(error.split())


def test_compress_evaluate_generate(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = write_texts(tmp_path / "text.jsonl"), tmp_path / "out"
    code, printed, _ = run(capsys, *compress(model, out, text))
    assert code == 0
    assert "21 matrices, 50.0000% zeros" in printed and "true bits" not in printed
    scores = tmp_path / "scores.json"
    code, printed, _ = run(
        capsys, "evaluate", out, "--reference", model, "--data", text, "--seq-len", 32, "--max-tokens", 320,
        "--json", scores, "--device", "cpu",
    )  # fmt: skip
    assert code == 0 and "320" in printed
    assert json.loads(scores.read_text())["perplexity"][str(text)] > 1
    code, printed, _ = run(capsys, "generate", out, "The garden", "--max-new-tokens", 4, "--device", "cpu")
    assert code == 0 and printed.startswith("The garden")


@pytest.mark.parametrize(
    ("pack", "says"),
    [("codes", "true bits a weight in 21 of them"), ("none", "by the method's count, stored as plain")],
)
def test_codes_are_told_in_bits_and_not_in_zeros(
    pack: str, says: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize = ["--method", "rtn", "--target", "4bit", "--set", "group=16", "--pack", pack, "--device", "cpu"]
    code, printed, _ = run(capsys, "compress", model, tmp_path / "out", *quantize)
    assert code == 0 and says in printed and "zeros" not in printed
    code, printed, _ = run(capsys, "inspect", tmp_path / "out")
    assert code == 0 and "zeros in them" not in printed and "no errors: the method saw no text" in printed


def test_recipe_file_and_flags(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_texts(tmp_path / "text.jsonl")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f'method: sparsegpt\ntarget: "2:4"\ndevice: cpu\noptions: {{damping_frac: 0.05}}\n'
        f"calibration: {{files: [{text}], samples: 4, seq_len: 16}}\n"
    )
    out = tmp_path / "out"
    code, _, _ = run(capsys, "compress", model, out, "--recipe", recipe, "--seed", 3, "--set", "panel_columns=16")
    assert code == 0
    record = json.loads((out / "niwaki/run.json").read_text())
    assert record["recipe"]["seed"] == 3
    assert record["options"]["sparsegpt"]["damping_frac"] == 0.05
    assert record["options"]["sparsegpt"]["panel_columns"] == 16


WRONG = [
    (["compress", "{tmp}/gone", "{tmp}/out", "--method", "wanda", "--target", "0.5"], "no model folder at"),
    (["compress", "{model}", "{tmp}/out", "--target", "0.5"], "method is missing: give one"),
    (["compress", "{model}", "{tmp}/out", "--method", "sparsgpt", "--target", "0.5"], "did you mean 'sparsegpt'"),
    (
        ["compress", "{model}", "{tmp}/out", "--method", "wanda", "--target", "0.5", "--seq-len", "65"],
        "64 positions of the model: pass --seq-len 64",
    ),
    (["compress", "{model}", "{tmp}/out", "--method", "wanda", "--target", "0.5", "--set", "a"], "expected key=value"),
    (["compress", "{model}", "{tmp}/out", "--method", "wanda", "--target", "1:3"], "multiple of 3"),
    (["compress", "{model}", "{tmp}/out", "--recipe", "{tmp}/no.yaml"], "cannot read the recipe"),
    (["evaluate", "{model}"], "nothing to evaluate"),
    (["evaluate", "{model}", "--data", "{tmp}/no.txt", "--seq-len", "32"], "no such text file"),
    (["evaluate", "{model}", "--data", "x.txt", "--json", "{tmp}/no/x.json"], "does not exist"),
    (["generate", "{model}", "hi", "--max-new-tokens", "999"], "the model has 64 positions"),
    (["generate", "{model}", "hi", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
    (["generate", "{model}", "hi", "--temperature", "-1"], "temperature must be 0 (greedy) or more, got -1.0"),
    (["evaluate", "{model}", "--data", "x.txt", "--json", "{tmp}"], "is a folder: expected a file name"),
    (["compress", "{model}", "{model}", "--method", "magnitude", "--target", "0.5", "--overwrite"], "not a niwaki"),
    (["compress", "{model}", "{tmp}/out", "--method", "wanda", "--target", "50"], "write 50% or 0.5"),
    (["compress", "{model}", "{tmp}/out", "--method", "wanda", "--target", "0.5", "--set", "x=1"], "has no options"),
    (["generate", "{model}", ""], "the prompt is empty"),
    (["methods", "wandaa"], "did you mean 'wanda'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    filled = [part.format(model=model, tmp=tmp_path) for part in arguments]
    code, printed, errors = run(capsys, *filled)
    assert code == 2
    assert printed == ""
    assert errors.startswith("error: ") and len(errors.strip().splitlines()) == 1
    assert message in errors
    assert not list(tmp_path.iterdir())


def test_methods_lists_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys, "methods")
    assert code == 0
    for name in ("magnitude", "wanda", "sparsegpt"):
        assert name in printed
    code, printed, _ = run(capsys, "methods", "sparsegpt")
    assert "damping_frac=0.01" in printed and "Frantar" in printed
    _, printed, _ = run(capsys, "methods", "squeeze10")
    assert {"1.", "2.", "3.", "4."} <= {line.split(" ")[0] for line in printed.splitlines()}, "a list, not prose"


def test_interrupt_says_how_to_go_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    text = write_texts(tmp_path / "text.jsonl")
    monkeypatch.setattr("niwaki.data.texts.sampled_windows", interrupted)
    code, _, errors = run(
        capsys, "compress", model, tmp_path / "out", "--method", "wanda", "--target", "0.5", "--seq-len", 16,
        "--device", "cpu",
    )  # fmt: skip
    assert code == 130 and "--resume" not in errors and "nothing is kept" in errors
    assert not list(tmp_path.glob("out*"))
    monkeypatch.setattr("niwaki.compression.job.compress_blocks", interrupted)
    code, _, errors = run(capsys, *compress(model, tmp_path / "out", text))
    assert code == 130 and "--resume" in errors
    assert (tmp_path / "out.partial").exists()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys, "--version")
    assert code == 0 and printed == f"niwaki {niwaki.__version__}\n"


def test_help_shows_every_default(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 200)
    code, printed, _ = run(capsys, "compress", "--help")
    assert code == 0
    recipe, calibration = Recipe.model_fields, Calibration.model_fields
    lines = {line.split()[1]: line for line in printed.splitlines() if line.startswith("│ --")}
    for name in ("allocation", "seed", "device", "dtype"):
        assert f"[default: {recipe[name].default}]" in lines[f"--{name}"]
    for name in ("field", "samples", "seq_len"):
        assert f"[default: {calibration[name].default}]" in lines["--" + name.replace("_", "-")]
    _, printed, _ = run(capsys, "evaluate", "--help")
    assert '{"pairs": [[context, continuation], ...], "gold": index}' in printed


def test_progress_without_a_terminal(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, errors = run(capsys, *compress(model, tmp_path / "out", write_texts(tmp_path / "text.jsonl")))
    assert [line.split(",")[0] for line in errors.splitlines()] == [f"compressing: block {i}/3" for i in (1, 2, 3)]


def test_resume_of_a_finished_result(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = compress(model, tmp_path / "out", write_texts(tmp_path / "text.jsonl"))
    run(capsys, *command)
    code, printed, errors = run(capsys, *command, "--resume")
    assert code == 0 and "21 matrices" in printed and errors.startswith("already complete")


def test_a_recipe_that_is_wrong_in_many_ways(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    for content, message in [
        ("samplse: 3\n", "unknown recipe field 'samplse'"),
        ("method: wanda\ntarget: 2:4\n", 'target: "2:4"'),
        ("method: wanda\ntarget: 0.5\ncalibration: 5\n", "calibration: expected files"),
    ]:
        recipe.write_text(content)
        code, _, errors = run(capsys, "compress", model, tmp_path / "out", "--recipe", recipe)
        assert code == 2 and message in errors and len(errors.splitlines()) == 1


def crash(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `niwaki methods` end with `error`."""

    def fail() -> None:
        raise error

    monkeypatch.setattr("niwaki.cli.methods.print_methods", lambda console: fail())


def test_a_crash_of_our_own_ends_with_3_and_keeps_its_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    crash(monkeypatch, TypeError("no such thing\nand more"))
    code, printed, errors = run(capsys, "methods")
    (trace,) = tmp_path.glob("niwaki-crash-*.txt")
    assert code == 3 and printed == ""
    assert errors.count("\n") == 1 and "TypeError: no such thing" in errors and str(trace) in errors
    text = trace.read_text()
    assert "command: niwaki methods" in text and "Traceback" in text and "and more" in text and "torch" in text


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/full/file"), "/full/file: no space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: permission denied"),
        (OSError(errno.EFBIG, "File too large"), "file too large"),
        (SafetensorError("Error while serializing: I/O error: Full (os error 28)"), "no space left on device"),
        (Exception("Read-only (os error 30)"), "read-only file system"),  # as tokenizers raises it
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory"),
    ],
)
def test_a_fault_of_the_machine_is_refused_in_one_line(
    error: Exception, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    crash(monkeypatch, error)
    code, _, errors = run(capsys, "methods")
    assert code == 2 and says in errors and errors.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_reader_that_goes_away_is_no_failed_gate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    crash(monkeypatch, BrokenPipeError(errno.EPIPE, "Broken pipe"))
    stdout, stderr = sys.stdout, sys.stderr  # typer wraps both
    code, _, _ = run(capsys, "methods")
    sys.stdout, sys.stderr = stdout, stderr
    assert code == 141


def test_a_trace_holds_no_secrets() -> None:
    words = ["niwaki", "rollout", "--admin-key", "hush", "--api-key=hush", "--max-new-tokens", "8", "m"]
    kept = ["niwaki", "rollout", "--admin-key", "***", "--api-key=***", "--max-new-tokens", "8", "m"]
    assert without_secrets(words) == kept
