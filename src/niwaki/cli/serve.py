"""The command `niwaki serve`."""

import logging
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from niwaki.cli.options import ApiKeyFile, Device, Model, StoredDtype, check_inputs
from niwaki.errors import InputError

# Packages of the extra `serve`.
PACKAGES = ("fastapi", "uvicorn", "starlette", "prometheus_client", "h11")


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on. 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in requests. [dim]\\[default: name of the folder][/]")
    ] = None,
    slots: Annotated[int, typer.Option(help="Sequences that are decoded at once.")] = 8,
    queue: Annotated[int, typer.Option(help="Max requests that wait. Others get status 429.")] = 64,
    context: Annotated[
        int | None,
        typer.Option(help="Max tokens of prompt and answer. [dim]\\[default: positions of the model][/]"),
    ] = None,
    queue_timeout: Annotated[float, typer.Option(help="Max seconds that a request waits for a slot.")] = 30.0,
    first_token_timeout: Annotated[float, typer.Option(help="Max seconds from the slot to the first token.")] = 60.0,
    timeout: Annotated[float, typer.Option(help="Max seconds of a request in all.")] = 600.0,
    connections: Annotated[int, typer.Option(help="Max open connections. Others get status 503.")] = 1000,
    connections_per_address: Annotated[
        int, typer.Option(help="Max open connections of one address, such as that of a proxy.")
    ] = 1000,
    drain: Annotated[float, typer.Option(help="Max seconds that requests get to finish after SIGTERM.")] = 30.0,
    api_key_file: ApiKeyFile = None,
    without_keys: Annotated[
        bool, typer.Option("--without-keys", help="Allow an address other than loopback without API keys.")
    ] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Contextual models: run with all of the weights.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare all files with the SHA-256 in run.json first.")
    ] = True,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log.")] = False,
    device: Device = "auto",
    dtype: StoredDtype = "auto",
) -> None:
    """Serve MODEL to OpenAI clients: /v1/chat/completions, /v1/completions, /v1/models."""
    missing = next((package for package in PACKAGES if find_spec(package) is None), None)
    if missing is not None:
        package = missing.replace("_", "-")
        raise InputError(f"serving needs the package {package}: pip install {package}")
    check_inputs(model, device=device)
    from niwaki.model.device import pick_dtype
    from niwaki.serve.event_queue import Timeouts
    from niwaki.serve.http.keys import read_keys
    from niwaki.serve.http.protocol import ConnectionLimits
    from niwaki.serve.server import ServerSettings
    from niwaki.serve.server import serve as run

    limits: dict[str, Any] = {"slots": slots, "queue": queue, "context": context, "drain_s": drain}
    limits["connections"] = ConnectionLimits(connections, connections_per_address)
    timeouts = Timeouts(queue_timeout, first_token_timeout, timeout)
    access: dict[str, Any] = {"keys": read_keys(api_key_file), "without_keys": without_keys, "log_prompts": log_prompts}
    settings = ServerSettings(
        host=host, port=port, name=name, timeouts=timeouts, device=device, dtype=pick_dtype(dtype), dense=dense,
        verify=verify, **limits, **access,
    )  # fmt: skip
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    raise typer.Exit(run(model, settings))
