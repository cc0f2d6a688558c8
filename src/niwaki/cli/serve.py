"""The command that serves; `cli` puts it under its name."""

import logging
from pathlib import Path
from typing import Annotated

import typer

KEYS = "API keys, one a line; also from NIWAKI_API_KEYS, separated by commas."
DTYPE = "Arithmetic: auto (as stored), float32, bfloat16 or float16."


def serve(
    model: Annotated[str, typer.Argument(help="A local model folder or a hub id.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model. [dim]\\[default: the folder's name][/]")
    ] = None,
    slots: Annotated[int, typer.Option(help="Sequences that are written at once.")] = 8,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more are told to come back (429).")] = 64,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of prompt and answer together. [dim]\\[default: the model's positions][/]"),
    ] = None,
    queue_timeout: Annotated[float, typer.Option(help="Seconds a request may wait for a slot.")] = 30.0,
    first_token_timeout: Annotated[float, typer.Option(help="Seconds from there to its first token.")] = 60.0,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take in all.")] = 600.0,
    drain: Annotated[float, typer.Option(help="Seconds that running requests get after SIGTERM.")] = 30.0,
    api_key_file: Annotated[Path | None, typer.Option(help=KEYS)] = None,
    without_keys: Annotated[
        bool, typer.Option("--without-keys", help="Listen beyond this machine without keys.")
    ] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Contextual models: run all of the weights.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare weights with the SHA-256 in run.json first.")
    ] = True,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log.")] = False,
    device: Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help=DTYPE)] = "auto",
) -> None:
    """Serve MODEL to OpenAI's clients: /v1/chat/completions, /v1/completions, /v1/models."""
    from niwaki.errors import InputError
    from niwaki.model.device import pick_dtype
    from niwaki.serve.http.keys import read_keys

    try:
        from niwaki.serve.event_queue import Timeouts
        from niwaki.serve.server import Settings
        from niwaki.serve.server import serve as run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("fastapi", "uvicorn", "starlette", "prometheus_client", "h11"):
            raise
        package = (error.name or "").split(".")[0].replace("_", "-")
        raise InputError(f"serving needs the package {package}: pip install {package}") from error
    settings = Settings(
        host=host,
        port=port,
        name=name,
        slots=slots,
        queue=queue,
        context=context,
        timeouts=Timeouts(queue_timeout, first_token_timeout, timeout),
        drain_s=drain,
        keys=read_keys(api_key_file),
        without_keys=without_keys,
        log_prompts=log_prompts,
        device=device,
        dtype=pick_dtype(dtype),
        dense=dense,
        verify=verify,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    raise typer.Exit(run(model, settings))
