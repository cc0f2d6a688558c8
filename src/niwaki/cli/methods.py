"""The command `niwaki methods`: the list of methods and presets, and the description of one method."""

import re
import textwrap
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from niwaki.cli.options import console, print_line


def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method in full.", show_default=False)] = None,
) -> None:
    """List the methods, or describe one with its options."""
    if name is None:
        print_methods(console)
    else:
        print_method(console, name)


def print_methods(to: Console) -> None:
    """Print one row per method, then the recipe of each preset."""
    from niwaki.config.presets import PRESETS
    from niwaki.methods.registry import METHODS, get_method

    table = Table("method", "what", "needs", "paper")
    for name in METHODS:
        method = get_method(name)
        what = method.doc.split("\n")[0].partition(": ")[2]
        table.add_row(name, what, _needs(method.needs(method.config())), method.paper)
    to.print(table)
    for preset, recipes in PRESETS.items():
        for kind, recipe in recipes.items():
            given = {**({"--rotate": recipe["rotate"]} if "rotate" in recipe else {}), **recipe["options"]}
            options = " ".join(f"{name}={value}" for name, value in given.items())
            line = f"--preset {preset}, {kind}: {recipe['method']} with {options}"
            to.print(line, markup=False, highlight=False)


def print_method(to: Console, name: str) -> None:
    """Print the description of a method, with paragraphs that fill the console, and its options."""
    from niwaki.config.recipe import option_fields
    from niwaki.methods.registry import get_method

    method = get_method(name)
    for paragraph in re.split(r"\n\s*\n", method.doc.strip("\n")):
        if paragraph.startswith(("    ", "| ")):  # an example or a table
            print_line(paragraph.rstrip(), to)
        else:
            for item in re.split(r"\n(?=- |\d+\. )", paragraph):
                marker = re.match(r"- |\d+\. ", item)
                indent = " " * len(marker[0]) if marker else ""
                print_line(textwrap.fill(" ".join(item.split()), to.width, subsequent_indent=indent), to)
        to.print()
    options = option_fields(method.config)
    indent = " " * 8
    for option in options:
        print_line(f"    --set {option.name}={option.default}  ({option.kind.__name__})", to)
        print_line(textwrap.fill(option.explanation, to.width, initial_indent=indent, subsequent_indent=indent), to)
    if not options:
        to.print(f"{name} has no options.", markup=False, highlight=False)


def _needs(needs: Any) -> str:
    """Return the data that a method needs, in words."""
    parts = ["XᵀX per input"] if needs.gram else ["squared norms per input"] if needs.sqnorm else []
    parts += ["gradients"] if needs.gradient else []
    parts += ["windows to learn from"] if needs.windows else []
    return ", ".join(parts) or "no data"
