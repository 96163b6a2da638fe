"""Tables and progress: plain text in files and pipes; in a terminal they fit its width and have color, unless NO_COLOR is set."""

from __future__ import annotations

import io
import shutil
import sys
import time
from collections.abc import Sequence

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from tabulate import tabulate


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as text. In a terminal, cells that are too long for it are wrapped."""
    if not sys.stdout.isatty():
        return tabulate(rows, headers=header, tablefmt="simple", disable_numparse=True)
    width = shutil.get_terminal_size().columns
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(header):
        cells = [name, *(str(row[index]) for row in rows)]
        whole = index == 0 and max(map(len, cells)) <= width // 3  # what names a row is read first
        made.add_column(Text(name), overflow="fold", no_wrap=whole)
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    with console.capture() as captured:
        console.print(made)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


class Lines:
    """Progress as lines on stderr, with the seconds since the command began. Once `total` is set, they count what is done.

    In a terminal a bar below the lines shows the count.
    """

    def __init__(self) -> None:
        self._total: int | None = None
        self._done = 0
        self._start = time.monotonic()
        self._bar: Progress | None = None

    @property
    def total(self) -> int | None:
        """How often `done` will be called; None where nobody knows."""
        return self._total

    @total.setter
    def total(self, total: int) -> None:
        self._total = total
        context = click.get_current_context(silent=True)
        if context is not None and self._bar is None and sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task("", total=total)
            self._bar.start()
            context.call_on_close(self._bar.stop)  # after an error too, because it hides the cursor

    def say(self, what: str) -> None:
        """Prints a line. May be called from any thread."""
        if self._bar is not None:
            seconds = Text(f"{self.seconds:6.1f} s  ", style="dim")
            self._bar.console.print(seconds.append(what, style="default"), soft_wrap=True)
            return
        count = "" if self._total is None else f"[{self._done:3}/{self._total}] "
        click.echo(f"{count}{self.seconds:6.1f} s  {what}", err=True)

    def done(self, what: str) -> None:
        """Counts one of `total` as done, and prints a line."""
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])
        self.say(what)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start
