"""Commands of a staged roll-out; `cli` puts them under `niwaki rollout`."""

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from niwaki.cli.options import given
from niwaki.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Send traffic to a compressed model in steps, and back when it is worse.")
State = Annotated[
    str, typer.Option(help="Where the state is kept: a file, or postgresql+psycopg://USER@HOST/DATABASE.")
]
STATE = "rollout.sqlite"
LIMITS = "Limits: a gate file, or the compare.json of a report."
KEYS = "Keys of clients, one a line; also from NIWAKI_API_KEYS, separated by commas."
FILES = "Folder that the canary serves: when a file in it changes, it is another canary."
console = Console()
err_console = Console(stderr=True)


@app.command()
def run(
    stable: Annotated[str | None, typer.Option(help="Address of the server with the dense model.")] = None,
    canary: Annotated[str | None, typer.Option(help="Address of the server with the compressed model.")] = None,
    limits: Annotated[Path | None, typer.Option(help=LIMITS)] = None,
    candidate: Annotated[str | None, typer.Option(help="Which candidate of the compare.json.")] = None,
    limit: Annotated[list[str] | None, typer.Option(help="One limit more, signal=value. Repeatable.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings, YAML; flags win.")] = None,
    state: State = STATE,
    canary_files: Annotated[Path | None, typer.Option(help=FILES)] = None,
    shadow: Annotated[float | None, typer.Option(help="Share of dense requests copied to the canary.")] = None,
    audit: Annotated[float | None, typer.Option(help="Share of canary answers that are audited.")] = None,
    keep_texts: Annotated[
        bool | None, typer.Option("--keep-texts", help="Keep texts of audited requests, for `export`.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help=KEYS)] = None,
    host: Annotated[str, typer.Option(help="Where to listen; other than loopback only with keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8100,
    new: Annotated[bool, typer.Option("--new", help="Begin a new roll-out of the same canary.")] = False,
) -> None:
    """Run the gateway: begin a roll-out, or go on with the one of this canary."""
    _needed()
    from niwaki.rollout.limits import limits_from, quality_of
    from niwaki.rollout.running import run as serve
    from niwaki.rollout.settings import settings_from
    from niwaki.rollout.store import Store
    from niwaki.serve.http.keys import read_keys
    from niwaki.serve.http.limits import check_open

    values: dict[str, Any] = {
        "stable": given(url=stable),
        "canary": given(url=canary, files=canary_files),
        "sampling": given(shadow_frac=shadow, audit_frac=audit, keep_texts=keep_texts),
    }
    settings = settings_from(values, config)
    found = limits_from(limits, candidate=candidate, given=_given(limit or []))
    if not quality_of(found):
        raise InputError(
            "no limit of quality: give --limits report/compare.json, --limits gate.yaml or --limit top1_agreement=0.9"
        )
    own_keys = read_keys(api_key_file)
    check_open(host, own_keys)
    serve(
        settings, found, Store.open(state), keys=own_keys, host=host, port=port, anew=new,
        say=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
    )  # fmt: skip


@app.command()
def status(
    state: State = STATE,
    json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show where the roll-out stands and what was decided; exit code 1 if it was returned or aborted."""
    _needed()
    import json

    from niwaki.rollout.store import Store

    store = Store.open(state, create=False)
    current = store.current()
    if current is None:
        raise InputError("no roll-out yet: `niwaki rollout run` begins one")
    decisions = store.decisions(current, 20)
    if json_:
        said = {"rollout": current.id, "status": current.status, "share": current.share, "decisions": decisions}
        typer.echo(json.dumps(said, indent=2))
    else:
        line = f"roll-out {current.id} of {current.identity}: {current.status}, {current.share:.0%} to the canary"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        table = Table("when (UTC)", "verdict", "why")
        for one in decisions:
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(one["at"]))
            table.add_row(at, one["action"], one["reason"])
        console.print(table)
    if current.status in ("returned", "aborted"):
        raise typer.Exit(1)


@app.command()
def promote(
    state: State = STATE,
    full: Annotated[bool, typer.Option("--full", help="To the last step at once.")] = False,
) -> None:
    """Go to the next step without waiting for evidence; what is worse is still returned."""
    _manual(state, "promote", full=full)


@app.command()
def abort(state: State = STATE) -> None:
    """Send everything to the dense model, within a second."""
    _manual(state, "abort", full=False)


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="The .jsonl to write.", show_default=False)],
    state: State = STATE,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Write the texts of audited requests for `niwaki adapt --data OUT`, if they were kept."""
    _needed()
    from niwaki.rollout.exporting import export as write
    from niwaki.rollout.store import Store

    count = write(Store.open(state, create=False), out, overwrite=overwrite)
    console.print(f"{out}: {count} texts", markup=False, highlight=False, soft_wrap=True)


@app.command()
def manifest(
    kind: Annotated[str, typer.Argument(help="gateway-api or kserve.", show_default=False)],
    name: Annotated[str, typer.Option(help="Name of everything that is made.")] = "niwaki",
    namespace: Annotated[str, typer.Option(help="Namespace.")] = "default",
    stable_model: Annotated[str, typer.Option(help="Where the dense model lies.")] = "pvc://models/dense",
    canary_model: Annotated[str, typer.Option(help="Where the compressed model lies.")] = "pvc://models/compressed",
    image: Annotated[str, typer.Option(help="Image with niwaki\\[serve].")] = "registry.example/niwaki:latest",
) -> None:
    """Print an example of manifests for a cluster: both servers, the gateway, a route. Read it before you apply it."""
    from niwaki.rollout.manifest import Names, render

    names = Names(name, namespace, stable_model, canary_model, image)
    typer.echo(render(kind, names), nl=False)


def _manual(state: str, action: str, *, full: bool) -> None:
    _needed()
    from niwaki.rollout.controller import manual
    from niwaki.rollout.store import Store

    after = manual(Store.open(state, create=False), action, time.time(), full=full)
    line = f"roll-out {after.id}: {after.status}, {after.share:.0%} of requests to the canary"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _given(pairs: list[str]) -> dict[str, float]:
    found = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            found[name] = float(value)
        except ValueError as error:
            raise InputError(f"--limit {pair!r}: expected signal=value, such as top1_agreement=0.9") from error
    return found


def _needed() -> None:
    """Raises InputError with the command that installs what is missing."""
    needed = ("aiohttp", "prometheus_client", "sqlalchemy", "starlette", "uvicorn")
    missing = [name for name in needed if not find_spec(name)]
    if missing:
        packages = " ".join(missing).replace("_", "-")
        raise InputError(f"niwaki rollout needs other packages: pip install {packages}")
