"""Shows reported events on a terminal: a bar with the time left, or plain lines where there is no terminal."""

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_TITLES = {"scan": "measuring outliers", "block": "compressing", "evaluate": "evaluating"}


class Display:
    """Receives `report(event, **fields)` calls. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: dict[str, Any] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("blocks"),
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
        if event == "warning":
            self.console.print(f"[yellow]note:[/] {fields['message']}", highlight=False)
        if event not in _TITLES:
            return
        title = f"{_TITLES[event]} {fields.get('model', '')}".strip()
        if title not in self._bars:
            self._bars[title] = self._progress.add_task(title, total=fields["of"])
        self._progress.update(self._bars[title], completed=fields["index"] + 1)
