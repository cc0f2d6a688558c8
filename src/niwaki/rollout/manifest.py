"""Examples of manifests: both servers, the gateway in front of them, and a route that leads to it.

    render("gateway-api", Names())      Deployments and Services, and an HTTPRoute of the Gateway API (v1)
    render("kserve", Names())           two InferenceServices of KServe (v1beta1) in place of the servers

The gateway splits the traffic, not the cluster: only it sees whether the answers are right. So both InferenceServices
are whole ones, without KServe's own `canaryTrafficPercent`. Its state lies on a volume of its own, and there is one
replica: one gateway writes to one store. The HTTPRoute sends what carries the header of important requests straight to
dense. Examples to read and change: names, images, sizes, keys and volumes are yours.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from niwaki.errors import InputError, unknown

Manifest = dict[str, Any]
_GATEWAY_PORT, _SERVER_PORT = 8100, 8000
# Reached from within the cluster only.
_SERVED = ("--host", "0.0.0.0", "--port", str(_SERVER_PORT), "--without-keys")
_HEAD = """\
# An example, written by `niwaki rollout manifest {kind}`: change names, image, models and sizes before you apply it.
# The keys of clients go into the secret that the gateway mounts:
#   kubectl -n {namespace} create secret generic {name}-keys --from-file=keys=keys.txt
"""


@dataclass(frozen=True)
class Names:
    """What an example is filled with."""

    name: str = "niwaki"
    namespace: str = "default"
    stable_model: str = "pvc://models/dense"
    canary_model: str = "pvc://models/compressed"
    image: str = "registry.example/niwaki:latest"


def render(kind: str, names: Names) -> str:
    """The example as YAML. Raises InputError for an unknown kind, or names that no cluster takes."""
    if kind not in KINDS:
        raise InputError(unknown("kind of manifest", kind, KINDS))
    for value in (names.name, names.namespace):
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", value):
            raise InputError(f"expected a name of lower-case letters, digits and dashes, got {value!r}")
    head = _HEAD.format(kind=kind, name=names.name, namespace=names.namespace)
    parts = [yaml.safe_dump(one, sort_keys=False) for one in KINDS[kind](names)]
    return head + "---\n".join(["", *parts])


def gateway_api(names: Names) -> list[Manifest]:
    """Servers of niwaki's own, the gateway, and the route."""
    servers = [
        one
        for side, model in (("stable", names.stable_model), ("canary", names.canary_model))
        for one in _server(names, side, model)
    ]
    return [*servers, *_gateway(names, f"http://{names.name}-stable", f"http://{names.name}-canary"), _route(names)]


def kserve(names: Names) -> list[Manifest]:
    """InferenceServices with KServe's Hugging Face runtime, the gateway, and the route."""
    services = [
        _inference_service(names, side, model)
        for side, model in (("stable", names.stable_model), ("canary", names.canary_model))
    ]
    urls = (f"http://{names.name}-{side}-predictor.{names.namespace}/openai" for side in ("stable", "canary"))
    route = _route(names, stable=f"{names.name}-stable-predictor")
    return [*services, *_gateway(names, *urls), route]


KINDS: dict[str, Callable[[Names], list[Manifest]]] = {"gateway-api": gateway_api, "kserve": kserve}


def _server(names: Names, side: str, model: str) -> list[Manifest]:
    volume, _, folder = model.removeprefix("pvc://").partition("/")
    container = {
        "name": "server",
        "image": names.image,
        "args": ["serve", f"/models/{folder}", *_SERVED, "--name", names.name],
        "ports": [{"containerPort": _SERVER_PORT}],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": _SERVER_PORT}},
        "volumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
    }
    volumes = [{"name": "models", "persistentVolumeClaim": {"claimName": volume, "readOnly": True}}]
    return [
        _deployment(names, side, container, volumes),
        _service(names, side, _SERVER_PORT),
    ]


def _inference_service(names: Names, side: str, model: str) -> Manifest:
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": _metadata(names, side),
        "spec": {
            "predictor": {
                "model": {
                    "modelFormat": {"name": "huggingface"},
                    "args": [f"--model_name={names.name}"],
                    "storageUri": model,
                    "resources": {"limits": {"nvidia.com/gpu": "1"}, "requests": {"nvidia.com/gpu": "1"}},
                }
            }
        },
    }


def _gateway(names: Names, stable: str, canary: str) -> list[Manifest]:
    container = {
        "name": "gateway",
        "image": names.image,
        "args": [
            "rollout", "run", "--stable", stable, "--canary", canary, "--limits", "/etc/niwaki/gate.yaml",
            "--state", "/state/rollout.sqlite", "--api-key-file", "/etc/niwaki-keys/keys",
            "--host", "0.0.0.0", "--port", str(_GATEWAY_PORT),
        ],
        "ports": [{"containerPort": _GATEWAY_PORT}],
        "livenessProbe": {"httpGet": {"path": "/health", "port": _GATEWAY_PORT}},
        "readinessProbe": {"httpGet": {"path": "/ready", "port": _GATEWAY_PORT}},
        "volumeMounts": [
            {"name": "state", "mountPath": "/state"},
            {"name": "limits", "mountPath": "/etc/niwaki", "readOnly": True},
            {"name": "keys", "mountPath": "/etc/niwaki-keys", "readOnly": True},
        ],
    }  # fmt: skip
    volumes = [
        {"name": "state", "persistentVolumeClaim": {"claimName": f"{names.name}-gateway"}},
        {"name": "limits", "configMap": {"name": f"{names.name}-gateway"}},
        {"name": "keys", "secret": {"secretName": f"{names.name}-keys"}},
    ]
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(names, "gateway"),
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    limits = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(names, "gateway"),
        "data": {"gate.yaml": "min_top1_agreement: 0.9\nmax_perplexity_ratio: 1.1\n"},
    }
    deployment = _deployment(names, "gateway", container, volumes)
    deployment["spec"]["strategy"] = {"type": "Recreate"}  # two would write to one store
    return [claim, limits, deployment, _service(names, "gateway", _GATEWAY_PORT)]


def _route(names: Names, stable: str | None = None) -> Manifest:
    important = {
        "matches": [
            {
                "path": {"type": "PathPrefix", "value": "/v1"},
                "headers": [{"type": "Exact", "name": "x-priority", "value": "high"}],
            }
        ],
        "backendRefs": [{"name": stable or f"{names.name}-stable", "port": 80}],
    }
    others = {
        "matches": [{"path": {"type": "PathPrefix", "value": "/v1"}}],
        "backendRefs": [{"name": f"{names.name}-gateway", "port": 80}],
    }
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": _metadata(names, "gateway"),
        "spec": {"parentRefs": [{"name": names.name}], "rules": [important, others]},
    }


def _deployment(names: Names, part: str, container: Manifest, volumes: list[Manifest]) -> Manifest:
    labels = {"app": f"{names.name}-{part}"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(names, part),
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container], "volumes": volumes}},
        },
    }


def _service(names: Names, part: str, port: int) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(names, part),
        "spec": {"selector": {"app": f"{names.name}-{part}"}, "ports": [{"port": 80, "targetPort": port}]},
    }


def _metadata(names: Names, part: str) -> Manifest:
    return {"name": f"{names.name}-{part}", "namespace": names.namespace}
