"""A progress line for bulk runs: done of all, rate, bytes, errors. The core's counters are read, never called back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, TimeRemainingColumn
from rich.text import Text

from moecore.render import size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.progress import Task

    from moecore.report import ScanReport
    from moecore.scan import Session


class _Traffic(ProgressColumn):
    """Repos a second, requests, bytes and errors so far."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def render(self, task: Task) -> Text:
        requests, received = self._session.counters()
        rate = task.speed or 0.0
        text = Text(f"{rate:.1f} repos/s · {requests:,} requests · {size(received)}", style="cyan")
        errors = task.fields["errors"]
        return text.append(f" · {errors} errors", style="red") if errors else text


def watched(session: Session, reports: Iterable[ScanReport], *, total: int, done: int) -> Iterator[ScanReport]:
    """Passes reports through and shows how far they are, on standard error."""
    columns = (SpinnerColumn(), MofNCompleteColumn(), BarColumn(), _Traffic(session), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("scan", total=total, completed=done, errors=0)
        errors = 0
        for report in reports:
            errors += report.error is not None
            progress.update(task, advance=1, errors=errors)
            yield report
