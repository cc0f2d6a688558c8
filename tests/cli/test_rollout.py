"""`niwaki rollout` as a user meets it: lines, exit codes, examples."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from niwaki.rollout.store import Change, Store
from support.models import run
from support.rollouts import LIMITS, settings

EXAMPLES = sorted((Path(__file__).parents[2] / "examples/kubernetes").glob("*.yaml"))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    from niwaki.rollout.start import begin_or_resume

    path = tmp_path / "rollout.sqlite"
    begin_or_resume(Store.open(path), settings(), LIMITS, 0.0)
    return path


def test_status_promote_abort(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys, "rollout", "status", "--state", state)
    assert code == 0 and "roll-out 1 of the model at http://canary: running, 50% to the canary" in printed
    code, printed, _ = run(capsys, "rollout", "promote", "--state", state)
    assert code == 0 and "roll-out 1: running, 100% of requests to the canary" in printed
    code, printed, _ = run(capsys, "rollout", "abort", "--state", state)
    assert code == 0 and "roll-out 1: aborted, 0% of requests" in printed
    code, printed, _ = run(capsys, "rollout", "status", "--state", state, "--json")
    found = json.loads(printed)
    assert code == 1 and found["status"] == "aborted"
    assert [one["action"] for one in found["decisions"]] == ["abort", "promote", "begin"]
    code, _, said = run(capsys, "rollout", "promote", "--state", state)
    assert code == 2 and "only a running one can be promoted" in said


def test_a_returned_roll_out_is_an_exit_code_for_pipelines(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store.open(state)
    current = store.current()
    assert current is not None
    store.change(current, Change("return", "returned", 0, "error_rate is certainly above 0.002"), 1.0)
    code, printed, _ = run(capsys, "rollout", "status", "--state", state)
    assert code == 1 and "returned" in printed and "error_rate" in printed


WRONG = [
    (["run"], "no address of the stable server"),
    (["run", "--stable", "http://a", "--canary", "http://b"], "no limit of quality"),
    (["run", "--stable", "http://a", "--canary", "http://b", "--limit", "top1"], "expected signal=value"),
    (["run", "--stable", "http://a", "--canary", "http://b", "--limit", "kl=1"], "unknown signal"),
    (
        ["run", "--stable", "http://a", "--canary", "http://b", "--limit", "top1_agreement=0.9", "--host", "0.0.0.0"],
        "give --api-key-file FILE",
    ),
    (["status"], "`niwaki rollout run --state"),
    (["export", "{tmp}/out.jsonl"], "`niwaki rollout run --state"),
]


@pytest.mark.parametrize(("words", "said"), WRONG)
def test_wrong_input_is_one_line_and_writes_nothing(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [word.format(tmp=tmp_path) for word in words]
    code, _, printed = run(capsys, "rollout", *own, "--state", tmp_path / "gone.sqlite")
    assert code == 2 and said in printed and printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_kubernetes_examples_are_consistent(path: Path) -> None:
    """Kinds, required fields, and names that match, as far as a test can check them without the schemas."""
    found = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    assert all(
        one["metadata"]["namespace"] == "default" and one["metadata"]["name"].startswith("niwaki-") for one in found
    )
    by_kind: dict[str, list[dict]] = {}
    for one in found:
        by_kind.setdefault(one["kind"], []).append(one)
    versions = {
        "Deployment": "apps/v1", "HTTPRoute": "gateway.networking.k8s.io/v1", "Service": "v1",
        "InferenceService": "serving.kserve.io/v1beta1", "PersistentVolumeClaim": "v1", "ConfigMap": "v1",
    }  # fmt: skip
    assert all(versions[one["kind"]] == one["apiVersion"] for one in found)
    names = {kind: {one["metadata"]["name"] for one in own} for kind, own in by_kind.items()}
    for one in by_kind["Deployment"]:
        pod = one["spec"]["template"]
        assert one["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            assert container["image"] and all(isinstance(word, str) for word in container["args"])
    pods = {one["spec"]["template"]["metadata"]["labels"]["app"] for one in by_kind["Deployment"]}
    assert all(one["spec"]["selector"]["app"] in pods for one in by_kind["Service"])
    (route,) = by_kind["HTTPRoute"]
    important, others = route["spec"]["rules"]
    assert important["matches"][0]["headers"] == [{"type": "Exact", "name": "x-priority", "value": "high"}]
    assert others["backendRefs"] == [{"name": "niwaki-gateway", "port": 80}] and route["spec"]["parentRefs"]
    predictors = {f"{name}-predictor" for name in names.get("InferenceService", ())}
    assert important["backendRefs"][0]["name"] in names["Service"] | predictors
    gateway = next(one for one in by_kind["Deployment"] if one["metadata"]["name"] == "niwaki-gateway")
    assert gateway["spec"]["replicas"] == 1 and gateway["spec"]["strategy"] == {"type": "Recreate"}
    for one in by_kind.get("InferenceService", ()):
        model = one["spec"]["predictor"]["model"]
        assert model["modelFormat"] == {"name": "huggingface"} and model["storageUri"].startswith("pvc://")
        assert "canaryTrafficPercent" not in one["spec"]["predictor"]


def test_a_gateway_needs_no_torch() -> None:
    imported = "niwaki.cli.app, niwaki.rollout.running, niwaki.rollout.app"
    script = f"import sys; import {imported}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_commands_of_the_kubernetes_examples_exist(path: Path) -> None:
    import typer

    from niwaki.cli.app import app

    for deployment in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        if deployment["kind"] == "Deployment":
            words = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
            command: Any = typer.main.get_command(app)
            for word in words[: 2 if words[0] == "rollout" else 1]:
                command = command.commands[word]
            options = {name for one in command.params for name in one.opts}
            assert {word for word in words if word.startswith("--")} <= options
