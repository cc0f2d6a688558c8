"""The commands `niwaki rollout ...` of a staged roll-out."""

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from niwaki.cli.options import ApiKeyFile, PrintJson, console, given, print_line
from niwaki.errors import InputError

app = typer.Typer(
    no_args_is_help=True, help="Send traffic to a compressed model in steps, and back to dense when it is worse."
)
State = Annotated[str, typer.Option(help="Store of the state: a file, or postgresql+psycopg://USER@HOST/DATABASE.")]
DenseFile = Annotated[
    Path | None,
    typer.Option(
        help="File that keeps a return to dense or an abort while the database is away. "
        "[dim]\\[default: beside the SQLite file, in the current folder with PostgreSQL][/]"
    ),
]
STATE = "rollout.sqlite"
LIMITS_HELP = "Limits: a gate file, or the compare.json of a report."
FILES_HELP = "Folder that the canary serves. A changed file makes it another canary."


@app.command()
def run(
    stable: Annotated[str | None, typer.Option(help="Address of the server with the dense model.")] = None,
    canary: Annotated[str | None, typer.Option(help="Address of the server with the compressed model.")] = None,
    limits: Annotated[Path | None, typer.Option(help=LIMITS_HELP)] = None,
    candidate: Annotated[str | None, typer.Option(help="Candidate of the compare.json.")] = None,
    limit: Annotated[list[str] | None, typer.Option(help="One more limit, signal=value. Repeatable.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings. Options on the command line win.")] = None,
    state: State = STATE,
    canary_files: Annotated[Path | None, typer.Option(help=FILES_HELP)] = None,
    shadow: Annotated[
        float | None, typer.Option(help="Share of the dense requests that are copied to the canary.")
    ] = None,
    audit: Annotated[float | None, typer.Option(help="Share of the canary answers that are audited.")] = None,
    keep_texts: Annotated[
        bool | None, typer.Option("--keep-texts", help="Keep the texts of audited requests, for `export`.")
    ] = None,
    api_key_file: ApiKeyFile = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Addresses other than loopback need keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8100,
    dense_file: DenseFile = None,
    new: Annotated[bool, typer.Option("--new", help="Start a new roll-out of the same canary.")] = False,
) -> None:
    """Run the gateway: start a roll-out, or continue the one of this canary."""
    _check_packages()
    from niwaki.rollout.limits import limits_from, quality_of
    from niwaki.rollout.running import run as serve
    from niwaki.rollout.settings import settings_from
    from niwaki.rollout.store import Store
    from niwaki.serve.http.keys import read_keys
    from niwaki.serve.http.limits import check_host

    values: dict[str, Any] = {
        "stable": given(url=stable),
        "canary": given(url=canary, files=canary_files),
        "sampling": given(shadow_frac=shadow, audit_frac=audit, keep_texts=keep_texts),
    }
    settings = settings_from(values, config)
    own_limits = limits_from(limits, candidate=candidate, given=_parse_limits(limit or []))
    if not quality_of(own_limits):
        raise InputError(
            "no limit of quality: give --limits report/compare.json, --limits gate.yaml or --limit top1_agreement=0.9"
        )
    own_keys = read_keys(api_key_file)
    check_host(host, own_keys)
    serve(
        settings, own_limits, Store.open(state), keys=own_keys, host=host, port=port, new=new,
        dense_file=dense_file, say=print_line,
    )  # fmt: skip


@app.command()
def status(
    state: State = STATE,
    json_: PrintJson = False,
) -> None:
    """Show the state of the roll-out and its decisions. Exit code 1 after a return to dense or an abort."""
    _check_packages()
    from niwaki.rollout.store import Store

    store = Store.open(state, create=False)
    current = store.current()
    if current is None:
        raise InputError("no roll-out yet: `niwaki rollout run` starts one")
    decisions = store.decisions(current, 20)
    if json_:
        summary = {"rollout": current.id, "status": current.status, "share": current.share, "decisions": decisions}
        typer.echo(json.dumps(summary, indent=2))
    else:
        line = f"roll-out {current.id} of {current.identity}: {current.status}, {current.share:.0%} to the canary"
        print_line(line)
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
    full: Annotated[bool, typer.Option("--full", help="Go to the last step at once.")] = False,
) -> None:
    """Take the next step now, without more evidence. A worse canary still goes back to dense."""
    _check_packages()
    from niwaki.rollout.start import apply_command
    from niwaki.rollout.store import Store

    after = apply_command(Store.open(state, create=False), "promote", time.time(), full=full)
    print_line(f"roll-out {after.id}: {after.status}, {after.share:.0%} of requests to the canary")


@app.command()
def abort(state: State = STATE, dense_file: DenseFile = None) -> None:
    """Send all traffic to the dense model, within a second, also while the database does not answer."""
    _check_packages()
    from niwaki.rollout.start import abort_by_mark

    after = abort_by_mark(state, time.time(), dense_file)
    if isinstance(after, Path):
        print_line(f"the database does not answer: the abort is in {after}, which the gateway reads and stores later")
    else:
        print_line(f"roll-out {after.id}: {after.status}, {after.share:.0%} of requests to the canary")


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="New .jsonl file.", show_default=False)],
    state: State = STATE,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Write the texts of audited requests, if they were kept, for `niwaki adapt --data OUT`."""
    _check_packages()
    from niwaki.rollout.store import Store, export_texts

    count = export_texts(Store.open(state, create=False), out, overwrite=overwrite)
    print_line(f"{out}: {count} texts")


def _parse_limits(pairs: list[str]) -> dict[str, float]:
    limits = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            limits[name] = float(value)
        except ValueError as error:
            raise InputError(f"--limit {pair!r}: expected signal=value, such as top1_agreement=0.9") from error
    return limits


def _check_packages() -> None:
    """Raise InputError with the command that installs the missing packages."""
    needed = ("aiohttp", "prometheus_client", "sqlalchemy", "starlette", "uvicorn")
    missing = [name for name in needed if not find_spec(name)]
    if missing:
        packages = " ".join(missing).replace("_", "-")
        raise InputError(f"niwaki rollout needs other packages: pip install {packages}")
