"""Measures of the house: entries, files, levels and circles of imports, lengths of functions, language, README.

    python tests/house/measures.py [SOURCE]

SOURCE is the package folder, `src/niwaki` without it. The same script measures an older checkout.
"""

import ast
import statistics
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from house.english import docstrings, faults_of_docstring


def module_files(source: Path) -> dict[str, Path]:
    """Return the modules below a package folder by their dotted name."""
    files = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def import_graph(files: dict[str, Path]) -> dict[str, set[str]]:
    """Return the modules that each module imports, lazily or not, without the package itself."""
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "niwaki":
                base = (node.module or "").partition(".")[2]
                inner = [f"{base}.{alias.name}".strip(".") for alias in node.names]
                found |= {one if one in files else base for one in inner}
        graph[name] = found - {"", name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the groups of modules that import each other, directly or through others."""
    reach = {name: reachable(name, graph) for name in graph}
    groups = {frozenset({name} | {other for other in reach[name] if name in reach.get(other, ())}) for name in graph}
    return [set(group) for group in groups if len(group) > 1]


def reachable(name: str, graph: dict[str, set[str]]) -> set[str]:
    """Return all modules that a module imports, directly or through others."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for other in graph.get(waiting.pop(), set()) - found:
            found.add(other)
            waiting.append(other)
    return found


def levels(graph: dict[str, set[str]]) -> int:
    """Return the length of the longest chain of imports, with a circle as one module."""
    owner = {name: name for name in graph}
    for group in circles(graph):
        owner |= dict.fromkeys(group, min(group))
    joined: dict[str, set[str]] = {}
    for name, others in graph.items():
        joined.setdefault(owner[name], set()).update(owner[one] for one in others if one in owner)

    @cache
    def depth(name: str) -> int:
        return 1 + max((depth(other) for other in joined[name] - {name}), default=0)

    return max(depth(name) for name in joined)


def function_lengths(files: dict[str, Path]) -> list[int]:
    """Return the lines of every function, sorted."""
    return sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for path in files.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def main() -> None:
    """Print one line per measure."""
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "src/niwaki")
    files = module_files(source)
    graph = import_graph(files)
    lengths = function_lengths(files)
    texts = [found for path in files.values() for found in docstrings(path)]
    broken = [text for node, text in texts if list(faults_of_docstring(node, text))]
    hidden = ("__pycache__", "py.typed")
    entries = [path for path in source.iterdir() if path.name not in hidden and path.suffix != ".so"]
    top: dict[str, set[str]] = {}
    for name, others in graph.items():
        entry = name.split(".")[0]
        top.setdefault(entry, set()).update(other.split(".")[0] for other in others)
        top[entry].discard(entry)
    readme = source.parents[1] / "README.md"
    largest = max(files.values(), key=lambda path: path.read_text(encoding="utf-8").count("\n"))
    measures = {
        "entries of the package": len(entries),
        "Python files": len(files),
        "lines of the largest file": largest.read_text(encoding="utf-8").count("\n"),
        "imports between files": sum(len(others) for others in graph.values()),
        "levels of imports between entries": levels(top),
        "levels of imports between files": levels(graph),
        "circles between entries": len(circles(top)),
        "circles between files": len(circles(graph)),
        "functions": len(lengths),
        "lines per function, median": statistics.median(lengths),
        "lines per function, 90th percentile": lengths[int(0.9 * len(lengths))],
        "lines per function, longest": lengths[-1],
        "docstrings": len(texts),
        "docstrings that break a rule": len(broken),
        "words of the README": len(readme.read_text(encoding="utf-8").split()),
    }
    for name, value in measures.items():
        print(f"{name:40} {value:>8}")


if __name__ == "__main__":
    main()
