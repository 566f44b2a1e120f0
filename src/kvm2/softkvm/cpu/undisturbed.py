"""Work with the emulator that a signal's exception must not come into.

Python raises it in the main thread, wherever that is: in a function that the emulator calls it is lost, and what was
to be found out comes out wrong. In a thread of its own the work goes on, while the main thread waits and may be ended.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def undisturbed(work: Callable[[], T]) -> Callable[[], T]:
    """`work`, done in another thread; what it returns or raises.

    >>> undisturbed(lambda: threading.current_thread() is threading.main_thread())()
    False
    """

    @functools.wraps(work)
    def wait() -> T:
        found: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                found.append(work())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, name="kvm2-check", daemon=True)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return found[0]

    return wait
