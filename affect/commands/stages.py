# SPDX-License-Identifier: Apache-2.0
"""What a command that streams needs of its surroundings: the time of each stage, and Ctrl-C that ends it in order."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class Stages:
    """Adds up how long stages take, in the order in which they were met first.

    Attributes:
        seconds: By name.

    Example:
        >>> stages = Stages()
        >>> with stages("decode"):
        ...     pass
        >>> list(stages.seconds)
        ['decode']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.start = time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begun

    def timed(self, items: Iterable[T], stage: str) -> Iterator[T]:
        """Yield ``items``, counting the time that each takes to come as ``stage``."""
        iterator = iter(items)
        while True:
            with self(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def describe(self, count: int, unit: str) -> str:
        """Return the rate of the whole and of each stage alone, for ``count`` things of a kind."""
        whole = time.perf_counter() - self.start
        rates = ", ".join(f"{name} {count / max(took, 1e-9):.3g}" for name, took in self.seconds.items())
        return f"{count / max(whole, 1e-9):.3g} {unit}s/s in all; by stage alone: {rates}"


class Interruption:
    """Turns the first Ctrl-C into a request to end in order; the second one interrupts at once.

    Signals reach only the main thread: elsewhere nothing changes.

    Attributes:
        asked: Whether there was a request.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
