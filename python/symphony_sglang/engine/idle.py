"""Sleeping on idle without leaving an advisory waiting.

With ``--sleep-on-idle`` (our default on CPUs) SGLang's scheduler waits up to a second for a message
once no request runs (idle_sleeper.py:36). Advisories move while no request runs: every step of
theirs that follows another would start up to a second late, and expiry too.
"""

from __future__ import annotations

from typing import Any, Protocol

from symphony_sglang.engine import compat

# Between two looks at what expires or may be tried again.
WATCH_MILLISECONDS = 50


class Watched(Protocol):
    """What the sleeper asks (`AdvisoryDriver`)."""

    @property
    def active(self) -> bool:
        """Whether time matters to it at all."""

    @property
    def settled(self) -> bool:
        """Whether its last step neither started nor ended anything."""


class WatchfulSleeper:
    """SGLang's sleeper, which stays awake while a promotion has a next step to take.

    Only rank 0 has one; the others follow its broadcast, so nothing here is decided by rank.
    """

    def __init__(self, sleeper: Any, watched: Watched) -> None:
        if not hasattr(sleeper, "poller"):
            raise compat.IncompatibleSglangError(
                f"{type(sleeper).__name__} has no poller; expected SGLang 0.5.23's IdleSleeper"
            )
        self._sleeper = sleeper
        self._watched = watched

    def maybe_sleep(self) -> None:
        if not self._watched.active:
            self._sleeper.maybe_sleep()
        elif self._watched.settled:
            self._sleeper.poller.poll(WATCH_MILLISECONDS)


def watch_while_idle(scheduler: Any, watched: Watched) -> None:
    """Put our sleeper in front of SGLang's, where the scheduler has one."""
    if scheduler.idle_sleeper is not None:
        scheduler.idle_sleeper = WatchfulSleeper(scheduler.idle_sleeper, watched)
