"""Progress on a terminal: a bar with the time left, or plain lines without a terminal.

The time left is not known after the first block. That block includes work that is done once: open, compile, warm up.
"""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from niwaki.config.events import Event

_TITLES: dict[str, tuple[str, str]] = {
    Event.SAMPLE: ("generating calibration text", "tokens"),
    Event.SCAN: ("measuring the dense blocks", "blocks"),
    Event.INPUTS: ("storing the inputs of the blocks, first block to last", "blocks"),
    Event.GRADIENTS: ("gradients of the loss, last block to first", "blocks"),
    Event.ACTIVATIONS: ("recording activations of prompts, first block to last", "blocks"),
    Event.CANDIDATE_BLOCK: ("evaluating candidates, first block to last", "blocks"),
    Event.BLOCK: ("compressing", "blocks"),
    Event.EVALUATE: ("evaluating", "blocks"),
    Event.COMPARE: ("scoring", "windows"),
    Event.MEASURE: ("measuring speed and memory", "rounds"),
    Event.EXPORT: ("exporting", "parts"),
    Event.RECOVER: ("recovering", "steps"),
    Event.BENCH: ("measuring", "variants"),
}
_MAX_LINES = 20  # plain lines for events of tokens, tensors and windows


class Display:
    """Display of events: a context manager that is called as `report(event, **fields)`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: dict[str, Any] = {}
        self._began: dict[str, float] = {}
        self._first: dict[str, tuple[float, int]] = {}
        self._done: dict[str, int] = {}
        self._last = time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: str, **fields: Any) -> None:
        if event == Event.WARNING:
            self.console.print(f"[yellow]note:[/] {escape(fields['message'])}", highlight=False, soft_wrap=True)
        if event == Event.START:  # the second stage of a chain counts from 1 again
            for known in (self._began, self._first, self._done, self._bars):
                known.clear()
        if event == Event.CANDIDATE:
            line = f"tried {_shape_text(fields['shape'])}: loss {fields['loss']:.4f}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        if event == Event.COMPLETE:
            self.console.print(f"already complete: {fields['out']}", markup=False, highlight=False, soft_wrap=True)
        if event == Event.ALLOCATION and "kept_blocks" in fields:
            kept = ", ".join(map(str, fields["kept_blocks"])) or "none"
            line = f"blocks at 4 bits: {kept}; the others: {fields['rest_bits']:.3f} bits"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        if event not in _TITLES:
            return
        name, unit = _TITLES[event]
        title = f"{name} {fields.get('model', '')}".strip()
        done, of = fields.get("done", fields.get("index", -1) + 1), fields["of"]
        if done <= self._done.get(title, 0):  # the next candidate counts from 1 again
            for known in (self._began, self._first, self._bars):
                known.pop(title, None)
        self._done[title] = done
        if not self.console.is_terminal:
            self._print_line(title, unit, done, of)
            return
        if title not in self._bars:
            self._bars[title] = self._progress.add_task(title, total=of, unit=unit)
        self._progress.update(self._bars[title], completed=done)

    def _print_line(self, title: str, unit: str, done: int, of: int) -> None:
        """Print the number of a block, its seconds, and the time left at the mean pace after the first block."""
        now = time.perf_counter()
        began = self._began.setdefault(title, self._last)
        first, known = self._first.setdefault(title, (now, done))
        soon = now - self._last < (now - began) / done * of / _MAX_LINES
        if unit in ("tokens", "parts", "windows") and done < of and soon:
            return
        left = f", {(now - first) / (done - known) * (of - done):.0f} s left" if known < done < of else ""
        line = f"{title}: {unit.removesuffix('s')} {done}/{of}, {now - self._last:.1f} s{left}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._last = now


def _shape_text(shape: Mapping[str, Any]) -> str:
    """Describe a candidate shape: one number for all blocks, or one per block."""
    counts = [
        ", ".join(map(str, shape[kind])) if isinstance(shape[kind], list) else f"{shape[kind]}"
        for kind in ("neurons", "heads")
    ]
    removed = f" without blocks {', '.join(map(str, shape['dropped']))}" if shape.get("dropped") else ""
    return f"{counts[0]} neurons and {counts[1]} groups of heads{removed}"
