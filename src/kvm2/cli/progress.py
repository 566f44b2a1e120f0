"""The progress bar of commands that play scenarios."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Progress:
    """A bar on standard error, from the second second on and only on a terminal. Called once for each thing done."""

    def __init__(self, total: int) -> None:
        import time

        self._total, self._done, self._start = total, 0, time.monotonic()
        self._now: Callable[[], float] = time.monotonic
        self._advance: Callable[[], None] | None = None
        self._stop: Callable[[], None] = lambda: None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def __call__(self, name: str) -> None:
        import sys

        self._done += 1
        if self._advance is not None:
            self._advance()
        elif sys.stderr.isatty() and self._now() - self._start > 1:
            self._show()

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bar

        bar = Bar(console=Console(stderr=True), transient=True)
        task = bar.add_task("scenarios", total=self._total, completed=self._done)
        bar.start()
        self._advance, self._stop = lambda: bar.advance(task), bar.stop
