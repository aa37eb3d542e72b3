"""A deadline that interrupts what is running, so that a part ends by itself and in time."""

from __future__ import annotations

import signal
import time
from typing import Any


class Clock:
    """Rings at a time, given in seconds of `time.time`, which all processes share.

    Ringing is a KeyboardInterrupt in the main thread: `nflib.train.fit` then writes its checkpoint
    and returns. A Ctrl-C and a request to terminate ring as well.

    Attributes:
        rang: whether it did.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline, self.rang = deadline, False

    def left(self) -> float:
        return self.deadline - time.time()

    def start(self) -> None:
        """From now on it rings in this process."""
        for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ring)
        signal.setitimer(signal.ITIMER_REAL, max(0.001, self.left()))

    def stop(self) -> None:
        """It rings no more: what comes now is short and must be completed."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _ring(self, *_: Any) -> None:
        if not self.rang:
            self.rang = True
            raise KeyboardInterrupt
