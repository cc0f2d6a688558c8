"""The public names: functions with their parameters, commands with their options, methods with theirs."""

import inspect
import os
import re
from typing import Any

from unchanged_reading import Values
from unchanged_world import entry, passed

OLDER = {
    "text": "str",
    "integer": "int",
    "boolean": "bool",
    "path": "Path",
}  # names of types in older versions of typer


def python_names() -> Values:
    """Return the names of the package, and of every function the parameters with their defaults."""
    import niwaki

    found: Values = {"__version__": niwaki.__version__}
    for name in niwaki.__all__:
        value = getattr(niwaki, name)
        if inspect.isclass(value):
            found[name] = "class of " + ", ".join(base.__name__ for base in value.__mro__[1:-1])
            continue
        found[name] = "function"
        for parameter in inspect.signature(value).parameters.values():
            default = "required" if parameter.default is parameter.empty else default_text(parameter.default)
            found[f"{name}/{parameter.name}"] = f"{parameter.kind.description}, {default}"
    return found


def default_text(value: Any) -> str:
    """Describe a default on any machine: a function is a function, whatever its address."""
    return "function" if callable(value) else repr(value)


def command_names() -> Values:
    """Return every command, and every spelling of its options with kind and default, hidden ones too."""
    import typer

    found: Values = {}
    waiting = [("niwaki", typer.main.get_command(entry().app))]
    while waiting:
        path, command = waiting.pop()
        found[path] = "command"
        for parameter in command.params:
            for spelling in (*parameter.opts, *parameter.secondary_opts):
                if spelling != "--help":
                    found[f"{path} {spelling}"] = option_text(parameter)
        waiting += [(f"{path} {name}", child) for name, child in getattr(command, "commands", {}).items()]
    return found


def option_text(parameter: Any) -> str:
    """Describe an option or an argument: its kind, its type, its default."""
    kind = parameter.param_type_name
    many = " repeatable" if getattr(parameter, "multiple", False) or parameter.nargs == -1 else ""
    needed = " required" if parameter.required else ""
    default = None if callable(parameter.default) else parameter.default
    described = getattr(parameter, "type_descriptor", None)  # newer versions of typer
    if described is None:
        type_name = OLDER.get(parameter.type.name, parameter.type.name)
    else:
        type_name = getattr(described.annotation, "__name__", "other")
    return f"{kind} {type_name}{many}{needed}, default {default}"


def method_names() -> Values:
    """Return the methods, their options with defaults, and what the presets stand for."""
    os.environ["COLUMNS"] = "400"
    listed = passed("methods")
    names = re.findall(r"^[│|] (\w+) +[│|]", listed, re.MULTILINE)
    found: Values = {f"preset {name}": recipe for name, recipe in re.findall(r"--preset (\w+): (.+)", listed)}
    for name in names:
        found[name] = "method"
        for option, default, kind in re.findall(r"--set (\w+)=(.*?)  \((\w+)\)", passed("methods", name)):
            found[f"{name}/{option}"] = f"{kind} {default}"
    return found
