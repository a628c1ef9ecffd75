"""The sleeper that stays awake while an advisory has a next step to take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from symphony_sglang.engine import compat
from symphony_sglang.engine.idle import WATCH_MILLISECONDS, WatchfulSleeper, watch_while_idle


class SglangSleeper:
    """Counts what SGLang's own would have done; its poller is part of the interface."""

    def __init__(self) -> None:
        self.slept = 0
        self.waits: list[int] = []
        self.poller = SimpleNamespace(poll=self.waits.append)

    def maybe_sleep(self) -> None:
        self.slept += 1


@pytest.mark.parametrize(
    ("active", "settled", "slept", "waits"),
    [
        (False, True, 1, []),  # nothing of ours: as SGLang has it
        (False, False, 1, []),
        (True, False, 0, []),  # a next step is due: none at all
        (True, True, 0, [WATCH_MILLISECONDS]),  # only time can change anything
    ],
)
def test_it_sleeps_only_as_long_as_nothing_is_due(
    active: bool, settled: bool, slept: int, waits: list[int]
) -> None:
    inner = SglangSleeper()
    WatchfulSleeper(inner, SimpleNamespace(active=active, settled=settled)).maybe_sleep()
    assert (inner.slept, inner.waits) == (slept, waits)


def test_another_sleeper_is_refused_by_name() -> None:
    with pytest.raises(compat.IncompatibleSglangError, match="object has no poller"):
        WatchfulSleeper(object(), SimpleNamespace(active=False, settled=True))


def test_a_scheduler_that_never_sleeps_is_left_alone() -> None:
    scheduler = SimpleNamespace(idle_sleeper=None)
    watch_while_idle(scheduler, SimpleNamespace(active=True, settled=False))
    assert scheduler.idle_sleeper is None
