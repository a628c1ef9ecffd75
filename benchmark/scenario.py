"""A benchmark scenario: one TOML file says model, levels, workload, arms and repetitions.

Unknown keys are refused, so a misspelt setting cannot pass for a default.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from symphony_sglang.errors import ConfigError

SCENARIO_DIRECTORY = Path(__file__).parent / "scenarios"


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape of the generated Llama (``symphony tiny-model``).

    What matters is how long a token's KV takes to read beside how long it takes to compute. A
    Llama-3.1-8B on an A100 computes a token in some 110 us and reads it in 26 us from a disk of
    5 GB/s: 0.25. Few layers with many KV heads come nearest on a processor; the product's 12 layers
    of 768 with 4 KV heads compute twenty times too long.
    """

    layers: int = 12
    hidden: int = 768
    kv_heads: int | None = None
    vocab: int = 10_240
    dtype: str = "bfloat16"


class WorkerSizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Levels of every worker; the same for all arms. `symphony_flags` are for our servers only."""

    device_tokens: int
    host_gb: float
    nvme_gb: float = 8.0
    flags: tuple[str, ...] = ()
    symphony_flags: tuple[str, ...] = ()


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is sent. `source` is a trace family, whose file is given at the command line, or
    `conversations`, `agents` or `no-reuse`, which are generated (`benchmark.workloads`)."""

    source: str
    sessions: int
    session_requests: int
    concurrency: int
    scale_tokens: float = 1.0
    time_scale: float = 1.0
    think_seconds: float = 0.0
    think_seconds_max: float | None = None
    session_rate: float | None = None
    prompt_tokens_max: int = 8000
    output_tokens_max: int = 8
    skip_sessions: int = 0
    # Sessions are joined at this turn, at its length; those that end before are passed over.
    skip_turns: int = 0
    # First turns are sent before the time begins and do not count (``ReplayRules.seated``).
    seated: bool = False
    # Every other session of a trace pauses this many times as long.
    uneven: float = 1.0
    shared_prefix_tokens: int = 0
    skew: float = 0.0
    seed: int = 1


class Advice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    lead_seconds: float = 1.0
    missing_share: float = 0.0
    false_share: float = 0.0
    shuffled: bool = False
    expires_seconds: float = 60.0


class Arm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way to serve the workload. Arms with equal `server` and `workers` share their processes,
    one after the other, each with fresh tokens."""

    name: str
    server: Literal["recompute", "device", "hicache", "symphony"]
    workers: int = 1
    # "" sends to the one worker; else "stock:POLICY" (sglang-router) or "symphony:POLICY".
    router: str = ""
    advice: Advice | None = None

    @property
    def processes(self) -> tuple[str, int, str]:
        return (self.server, self.workers, self.router)


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file. Ratios are taken against the arm named `baseline`."""

    name: str
    title: str
    worker: WorkerSizes
    workload: Workload
    arm: tuple[Arm, ...]
    baseline: str
    repetitions: int = 3
    slo_ttft_seconds: float = 0.5
    # Of the figures, only requests that could have hit: a session's first turn cannot.
    returning_only: bool = True
    model: Model = Model()

    @property
    def version(self) -> int:
        """Of the files written from it."""
        return 1

    def order(self, repetition: int) -> list[Arm]:
        """ABBA: every other repetition runs the arms the other way round."""
        return list(self.arm)[:: -1 if repetition % 2 else 1]


def load_scenario(name: str) -> Scenario:
    """Read a scenario by name or path.

    Raises:
        ConfigError: it does not exist, is not TOML, or has a wrong or unknown field.
    """
    path = Path(name)
    if not path.suffix:
        path = SCENARIO_DIRECTORY / f"{name}.toml"
    try:
        fields = tomllib.loads(path.read_text())
    except OSError as error:
        known = ", ".join(sorted(item.stem for item in SCENARIO_DIRECTORY.glob("*.toml")))
        raise ConfigError(f"scenario {name!r}: {error.strerror}; known: {known}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        scenario = msgspec.convert(fields, Scenario)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from error
    return check_scenario(scenario, path)


def check_scenario(scenario: Scenario, path: Path) -> Scenario:
    """Names are unique and known, numbers in range.

    Raises:
        ConfigError: which is not, and what was expected.
    """
    names = [arm.name for arm in scenario.arm]
    if len(set(names)) != len(names) or not names:
        raise ConfigError(f"{path}: arms are {names}; expected at least one, each once")
    if scenario.baseline not in names:
        raise ConfigError(f"{path}: baseline is {scenario.baseline!r}; expected one of {names}")
    if scenario.repetitions < 1:
        raise ConfigError(f"{path}: repetitions is {scenario.repetitions}; expected at least 1")
    for arm in scenario.arm:
        if arm.workers < 1 or (arm.workers > 1 and not arm.router):
            raise ConfigError(
                f"{path}: arm {arm.name!r} has {arm.workers} workers and router {arm.router!r}; "
                "expected one worker, or a router"
            )
        if arm.advice is not None and arm.server != "symphony":
            raise ConfigError(f"{path}: arm {arm.name!r} is advised; only symphony servers can be")
    return scenario


def narrowed(
    scenario: Scenario, repetitions: int | None, arms: str | None, users: int | None
) -> Scenario:
    """The scenario with some of its settings replaced; its name says which workload it then is.

    Raises:
        ConfigError: an arm is not the scenario's, or a number is not positive.
    """
    changes: dict[str, object] = {}
    if repetitions is not None:
        changes["repetitions"] = repetitions
    if arms is not None:
        known = {arm.name: arm for arm in scenario.arm}
        names = arms.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ConfigError(f"--arms: {unknown} are not among {sorted(known)}")
        changes["arm"] = tuple(known[name] for name in names)
        changes["baseline"] = names[0]
    if users is not None:
        if users < 1:
            raise ConfigError(f"--users is {users}; expected at least 1")
        changes["name"] = f"{scenario.name}-{users}-users"
        changes["title"] = f"{scenario.title}; {users} users"
        changes["workload"] = msgspec.structs.replace(
            scenario.workload, sessions=users, concurrency=users
        )
    changed = msgspec.structs.replace(scenario, **changes)
    return check_scenario(changed, Path(scenario.name))
