"""What is being measured now and how long it will take: a line that moves in a terminal, else a line now and then."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.status import Status

#: Seconds between two lines where there is no terminal.
QUIET = 20.0


class Progress:
    """The line, on standard error.

    Args:
        console: where it is shown.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._status = Status("starting", console=self.console)
        self._part, self._part_end, self._end, self._shown = "", 0.0, 0.0, 0.0

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.stop()

    def begin(self, part: str, part_end: float, end: float) -> None:
        """A part begins; it and all should end at these times of `time.monotonic`."""
        self._part, self._part_end, self._end, self._shown = part, part_end, end, 0.0

    def show(self, doing: str, seconds_left: float | None) -> None:
        """Who is measured, and how long its part will take; None: unknown yet, so that the part's share is shown."""
        now = time.monotonic()
        part = max(0.0, self._part_end - now) if seconds_left is None else seconds_left
        word = "about" if seconds_left is not None else "at most"
        total = part + max(0.0, self._end - self._part_end)
        line = f"{self._part}: {doing} · {word} {_clock(part)} left of this part, at most {_clock(total)} of all"
        if self.console.is_terminal:
            self._status.update(line)
        elif now > self._shown + QUIET:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
            self._shown = now

    def note(self, text: str) -> None:
        """Says something that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
