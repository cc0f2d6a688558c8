"""Every kind of result is served as `niwaki.generate` runs it."""

import queue
import shutil
from pathlib import Path
from typing import Any

import pytest

import niwaki
from niwaki.runtime.contextual.predictor_files import write_shadow
from niwaki.serve.batch import PaddedBatch, PerSequence
from niwaki.serve.jobs import Decoded, Event, Failed, Finished, Job
from niwaki.serve.sampling import Sampling
from niwaki.serve.server import ServerSettings, make_service
from support.contextual import shadow_of
from support.inputs import input_shadow_of
from support.models import tiny_llama, write_texts

PROMPT = "The import statement finds a module, and the name of the garden is a list of trees that grow."
RESULTS: dict[str, dict[str, Any]] = {
    "packed": {"method": "rtn", "target": "4bit", "options": {"group": 16}},
    "sparse packed": {"method": "magnitude", "target": "2:4", "pack": "auto"},
    "structured": {"method": "shortgpt", "target": "0.3"},
}


CONTEXTUAL = {"contextual": shadow_of, "inputs": input_shadow_of}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    return tiny_llama(folder / "model", blocks=2, num_attention_heads=8, num_key_value_heads=4, eos_token_id=4095)


def make(model: Path, out: Path, name: str) -> None:
    if name in CONTEXTUAL:
        shutil.copytree(model, out)
        (out / "niwaki").mkdir()
        write_shadow(out, CONTEXTUAL[name](niwaki.load(out, device="cpu"), min_prompt=8))  # without a run.json
        return
    calibration = {"files": (str(write_texts(out.with_suffix(".jsonl"))),), "samples": 4, "seq_len": 16}
    niwaki.compress(model, out, device="cpu", calibration=calibration, **RESULTS[name])


@pytest.mark.parametrize("name", [*RESULTS, *CONTEXTUAL])
def test_results_write_what_they_write_elsewhere(model: Path, tmp_path: Path, name: str) -> None:
    make(model, tmp_path / "out", name)
    wanted = niwaki.generate(tmp_path / "out", PROMPT, max_new_tokens=8, device="cpu").removeprefix(PROMPT)
    service = make_service(tmp_path / "out", ServerSettings(device="cpu", slots=2))
    assert isinstance(service.engine.decoding.batch, PerSequence if name in CONTEXTUAL else PaddedBatch)
    ids = service.prompts.tokenize_text(PROMPT)
    found: list[queue.Queue[Event]] = [queue.Queue() for _ in range(2)]
    for events in found:
        service.engine.submit(Job(ids, Sampling(temperature=0.0), 8, events.put))
    for events in found:
        written = ""
        while not isinstance(event := events.get(timeout=20), Finished):
            assert not isinstance(event, Failed)
            written += event.text if isinstance(event, Decoded) else ""
        assert written == wanted
    service.close()
