"""A simulation as a TOML file: hardware, users and arms; unknown keys are refused."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import msgspec

from symphony_sglang.core.routing_policies import POLICIES
from symphony_sglang.errors import ConfigError
from symphony_sglang.sim.cluster import AdviceMix, RunRules
from symphony_sglang.sim.hardware import (
    DISKS,
    LINKS,
    MACHINES,
    MODELS,
    NETWORKS,
    Machine,
    Speeds,
    speeds_of,
)
from symphony_sglang.sim.users import UserRules
from symphony_sglang.sim.worker import Features

SCENARIO_DIRECTORY = Path(__file__).parent / "scenarios"


class ArmSetup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way to serve: a policy, what the servers can do, and the hints they get."""

    name: str
    policy: str = "symphony"
    features: Features = Features()
    advice: AdviceMix | None = None
    migrate: bool = False
    plan_moves: bool = False
    protect_device: float = 0.3
    protect_host: float = 0.5


class SimScenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`machine` and `model` name published profiles; `speeds` gives a measured one instead.

    `user_counts` sweeps the number of users; empty: `users.users` alone. `device_tokens` caps the
    device level. Users come one by one in the first `ramp_seconds`, and figures leave out requests
    due in the first `warm_seconds`.
    """

    name: str
    title: str
    workers: int
    seconds: float
    users: UserRules
    arm: tuple[ArmSetup, ...]
    machine: str = ""
    model: str = ""
    link: str = ""
    disk: str = ""
    network: str = ""
    speeds: Speeds | None = None
    device_tokens: int | None = None
    warm_seconds: float = 60.0
    ramp_seconds: float | None = None
    page_size: int = 256
    user_counts: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)

    def worker_speeds(self) -> Speeds:
        """The one profile of all workers.

        Raises:
            ConfigError: a name is unknown, or the model does not fit.
        """
        speeds = self.speeds
        if speeds is None:
            for name, known in ((self.machine, MACHINES), (self.model, MODELS)):
                if name not in known:
                    raise ConfigError(f"profile {name!r}; expected one of {', '.join(known)}")
            speeds = speeds_of(self._machine(), MODELS[self.model])
        if self.device_tokens is not None:
            speeds = dataclasses.replace(speeds, device_tokens=self.device_tokens)
        return speeds

    def _machine(self) -> Machine:
        """The named one, with the named parts in it."""
        machine = MACHINES[self.machine]
        parts = ((self.link, LINKS), (self.disk, DISKS), (self.network, NETWORKS))
        for name, known in parts:
            if name and name not in known:
                raise ConfigError(f"profile {name!r}; expected one of {', '.join(known)}")
        return dataclasses.replace(
            machine,
            link_bytes_per_second=LINKS.get(self.link, machine.link_bytes_per_second),
            disk=DISKS.get(self.disk, machine.disk),
            network_bytes_per_second=NETWORKS.get(self.network, machine.network_bytes_per_second),
        )

    def runs(self) -> list[RunRules]:
        """Every (users, arm, seed) in the order in which they are run."""
        speeds = self.worker_speeds()
        return [
            RunRules(
                name=arm.name,
                workers=self.workers,
                speeds=speeds,
                features=arm.features,
                users=dataclasses.replace(self.users, users=count),
                policy=arm.policy,
                seconds=self.seconds,
                advice=arm.advice,
                migrate=arm.migrate,
                plan_moves=arm.plan_moves,
                ramp_seconds=self.ramp_seconds,
                page_size=self.page_size,
                protect_device=arm.protect_device,
                protect_host=arm.protect_host,
                seed=seed,
            )
            for count in self.user_counts or (self.users.users,)
            for arm in self.arm
            for seed in self.seeds
        ]


def load_scenario(name: str) -> SimScenario:
    """Read a scenario by the name of a packaged one, or by path.

    Raises:
        ConfigError: it does not exist, is no TOML, or has a wrong or unknown field.
    """
    path = Path(name)
    if not path.suffix:
        path = SCENARIO_DIRECTORY / f"{name}.toml"
    try:
        scenario = msgspec.convert(tomllib.loads(path.read_text()), SimScenario)
    except OSError as error:
        known = ", ".join(sorted(item.stem for item in SCENARIO_DIRECTORY.glob("*.toml")))
        raise ConfigError(f"scenario {name!r}: {error.strerror}; packaged: {known}") from error
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: {error}") from error
    check_scenario(scenario, path)
    return scenario


def check_scenario(scenario: SimScenario, path: Path) -> None:
    """Raises ConfigError for values out of range, by name."""
    names = [arm.name for arm in scenario.arm]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"{path}: arms are {names}; expected at least one, each name once")
    for arm in scenario.arm:
        if arm.policy not in POLICIES:
            raise ConfigError(
                f"{path}: arm {arm.name!r} has policy {arm.policy!r}; "
                f"expected one of {', '.join(POLICIES)}"
            )
        mix = arm.advice
        if mix is not None and not (0 <= mix.missing_share <= 1 and 0 <= mix.false_share < 1):
            raise ConfigError(
                f"{path}: arm {arm.name!r} has shares {mix.missing_share:g} and "
                f"{mix.false_share:g}; expected 0 to 1, and below 1 for false ones"
            )
    if not 0 < scenario.workers <= 1024 or not scenario.page_size > 0:
        raise ConfigError(f"{path}: workers is {scenario.workers}; expected 1 to 1024")
    if not 0 <= scenario.warm_seconds < scenario.seconds:
        raise ConfigError(
            f"{path}: warm_seconds is {scenario.warm_seconds:g}; expected less than "
            f"seconds, {scenario.seconds:g}"
        )
    if any(count < 1 for count in (*scenario.user_counts, scenario.users.users)):
        raise ConfigError(f"{path}: a number of users is below 1")
    room = scenario.worker_speeds().device_tokens
    longest = scenario.users.context_tokens_max + scenario.users.answer_tokens_max
    if longest > room:
        raise ConfigError(
            f"{path}: contexts reach {longest} tokens; expected at most the device level's {room}"
        )
