"""The settings of this package: one frozen record, from flags, environment, file and defaults.

Every setting has a flag (``--symphony-host-gb``), an environment twin (``SYMPHONY_HOST_GB``) and a
key in a TOML file (``host_gb``, under ``[symphony]``). A flag beats the environment, which beats
the file, which beats the default. A value out of range stops the start.

The launcher resolves once and exports the twins, so that every process SGLang spawns reads the same
values with ``SymphonyConfig.from_environment``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from symphony_sglang.errors import ConfigError

FLAG_PREFIX = "--symphony-"
ENVIRONMENT_PREFIX = "SYMPHONY_"
# The names of ``store.SyncPolicy``, which this layer may not import; a test compares them.
TRANSFERS = ("socket", "nixl")
SYNC_POLICIES = ("batch", "interval", "off")
TRANSFER_KEY_CHARACTERS_MIN = 16


@dataclass(frozen=True, slots=True)
class Setting:
    """What the command line, the docs and the checks need to know of one field."""

    help: str
    minimum: float | None = None
    maximum: float | None = None
    metavar: str = ""


def setting(
    default: Any,
    text: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    metavar: str = "",
) -> Any:
    """A dataclass field that carries its own documentation and range."""
    return field(default=default, metadata={"setting": Setting(text, minimum, maximum, metavar)})


@dataclass(frozen=True, slots=True)
class SymphonyConfig:
    """All settings of a worker. Sizes are per tensor-parallel rank, in units of 10^9 bytes."""

    off: bool = setting(False, "run stock SGLang: no levels, no routes of ours")
    host_gb: float = setting(
        -1.0,
        "host memory level in GB per rank; -1 sizes it from free memory, 0 turns it off",
        minimum=-1.0,
        maximum=65536.0,
        metavar="GB",
    )

    nvme_dir: str = setting(
        "",
        "directory of the NVMe level; default: one per port under the user's cache directory",
        metavar="DIR",
    )
    nvme_gb: float = setting(
        -1.0,
        "NVMe level in GB per rank; -1 takes a share of the free space, 0 turns it off",
        minimum=-1.0,
        maximum=1e6,
        metavar="GB",
    )
    nvme_sync: str = setting(
        "interval",
        "when pages are made durable: batch, interval (at most a second later) or off",
        metavar="POLICY",
    )
    protect_device: float = setting(
        0.3,
        "share of the device level that advisories may protect from eviction",
        minimum=0.0,
        maximum=0.9,
        metavar="SHARE",
    )
    protect_host: float = setting(
        0.5,
        "share of the host level that advisories may protect from eviction",
        minimum=0.0,
        maximum=0.9,
        metavar="SHARE",
    )
    # Two, not one: who computes again occupies the device that all others wait for, who loads does
    # not. In simulated fleets (docs/simulator.md) 2 was a little better than 1 and nowhere worse.
    break_even: float = setting(
        2.0,
        "how many times slower than computing again a level may be and still be used, for loads "
        "leave the device to others; 0 uses every level",
        minimum=0.0,
        maximum=1000.0,
        metavar="FACTOR",
    )
    advise_rate: float = setting(
        200.0,
        "advisories a second that one caller may send on average; beyond it callers get 429",
        minimum=0.1,
        maximum=1e6,
        metavar="RATE",
    )
    advise_tokens: int = setting(
        67_108_864,
        "tokens that the live advisories of one caller may hold; beyond it callers get 429",
        minimum=1,
        maximum=1e12,
        metavar="TOKENS",
    )
    implicit_hints: bool = setting(
        True,
        "chat turns that end with a tool call, and sub-agents by their headers, announce the turn "
        "that follows",
    )

    feed: bool = setting(
        True,
        "publish residency, sessions and load for routers (ZMQ, reachable as the HTTP port is)",
    )
    feed_port: int = setting(
        0,
        "first of the feed's three ports per data-parallel rank; 0 chooses free ones",
        minimum=0,
        maximum=65535,
        metavar="PORT",
    )

    peer: bool = setting(
        True,
        "serve pages to other workers and take theirs (reachable as the HTTP port is)",
    )
    peer_port: int = setting(
        0,
        "first of the page servers' ports, one per rank; 0 chooses free ones",
        minimum=0,
        maximum=65535,
        metavar="PORT",
    )
    peer_local: bool = setting(
        True,
        "workers of the same user on this host may copy pages from each other's memory",
    )
    transfer: str = setting(
        "socket",
        "how pages travel between workers: socket, or nixl (RDMA, unencrypted; see "
        "docs/migration.md)",
        metavar="ENGINE",
    )
    transfer_key: str = setting(
        "",
        "secret of all workers that encrypts page transfers, at least 16 characters; better given "
        "by its environment variable; default: made from --api-key where there is one",
        metavar="SECRET",
    )

    grace: float = setting(
        20.0,
        "seconds after SIGTERM in which routers may take this worker's sessions; 0 ends at once",
        minimum=0.0,
        maximum=3600.0,
        metavar="SECONDS",
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            check_range(item, getattr(self, item.name))
        for name in ("host_gb", "nvme_gb"):
            size = getattr(self, name)
            if -1.0 < size < 0:
                raise ConfigError(
                    f"{flag_name(name)} is {size:g}; expected -1 (automatic), 0 (off) "
                    "or a size in GB"
                )
        if 0 < len(self.transfer_key) < TRANSFER_KEY_CHARACTERS_MIN:
            raise ConfigError(
                f"{flag_name('transfer_key')} has {len(self.transfer_key)} characters; "
                f"expected at least {TRANSFER_KEY_CHARACTERS_MIN}"
            )
        if self.transfer not in TRANSFERS:
            raise ConfigError(
                f"{flag_name('transfer')} is {self.transfer!r}; "
                f"expected one of {', '.join(TRANSFERS)}"
            )
        if self.transfer_key and self.transfer != "socket":
            raise ConfigError(
                f"{flag_name('transfer_key')} asks for encrypted pages, which "
                f"{flag_name('transfer')} {self.transfer} does not send; expected one of the two"
            )
        if self.nvme_sync not in SYNC_POLICIES:
            raise ConfigError(
                f"{flag_name('nvme_sync')} is {self.nvme_sync!r}; "
                f"expected one of {', '.join(SYNC_POLICIES)}"
            )

    @classmethod
    def resolve(
        cls,
        flags: Mapping[str, str | bool],
        environment: Mapping[str, str],
        file: Path | None = None,
    ) -> SymphonyConfig:
        """Merge the sources. `flags` holds only what the command line named, by field name.

        Raises:
            ConfigError: an unknown key, or a value of the wrong type or out of range.
        """
        known = {item.name: item for item in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, value in (read_file(file) if file else {}).items():
            if name not in known:
                raise ConfigError(
                    f"{file}: unknown setting {name!r}; expected one of {', '.join(sorted(known))}"
                )
            values[name] = convert(known[name], value, f"{file}: {name}")
        for name, item in known.items():
            text = environment.get(environment_name(name))
            if text is not None:
                values[name] = convert(item, text, environment_name(name))
        for name, value in flags.items():
            values[name] = convert(known[name], value, flag_name(name))
        return cls(**values)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> SymphonyConfig:
        """What the launcher exported, or what the user's own environment says."""
        source = os.environ if environment is None else environment
        path = source.get(f"{ENVIRONMENT_PREFIX}CONFIG")
        return cls.resolve({}, source, Path(path) if path else None)

    def to_environment(self) -> dict[str, str]:
        """The twins that make ``from_environment`` give this record again."""
        return {
            environment_name(item.name): format_value(getattr(self, item.name))
            for item in dataclasses.fields(self)
        }


def flag_name(name: str) -> str:
    """``host_gb`` -> ``--symphony-host-gb``."""
    return FLAG_PREFIX + name.replace("_", "-")


def environment_name(name: str) -> str:
    """``host_gb`` -> ``SYMPHONY_HOST_GB``."""
    return ENVIRONMENT_PREFIX + name.upper()


def format_value(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return str(value)


def convert(item: dataclasses.Field[Any], value: Any, source: str) -> Any:
    """`value` as the type of the field's default; `source` names where it came from."""
    expected: Any = type(item.default)
    if expected is bool:
        words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() in words:
            return words[str(value).lower()]
        raise ConfigError(f"{source} is {value!r}; expected a boolean (1 or 0)")
    if expected is str:
        if isinstance(value, str):
            return value
        raise ConfigError(f"{source} is {value!r}; expected text")
    try:
        if isinstance(value, bool):
            raise ValueError
        number = expected(value)
    except (TypeError, ValueError):
        kind = "a whole number" if expected is int else "a number"
        raise ConfigError(f"{source} is {value!r}; expected {kind}{range_text(item)}") from None
    check_range(item, number, source)
    return number


def check_range(item: dataclasses.Field[Any], value: Any, source: str | None = None) -> None:
    """Refuse a number outside the field's range, naming the flag, the value and the range."""
    rule: Setting = item.metadata["setting"]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low = -math.inf if rule.minimum is None else rule.minimum
    high = math.inf if rule.maximum is None else rule.maximum
    if not low <= value <= high:  # false for NaN too
        raise ConfigError(
            f"{source or flag_name(item.name)} is {value:g}; expected a number{range_text(item)}"
        )


def range_text(item: dataclasses.Field[Any]) -> str:
    rule: Setting = item.metadata["setting"]
    if rule.minimum is None:
        return "" if rule.maximum is None else f" of at most {number_text(rule.maximum)}"
    if rule.maximum is None:
        return f" of at least {number_text(rule.minimum)}"
    return f" from {number_text(rule.minimum)} to {number_text(rule.maximum)}"


def number_text(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def read_file(path: Path) -> dict[str, Any]:
    """The ``[symphony]`` table of a TOML file."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{FLAG_PREFIX}config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{FLAG_PREFIX}config {path}: not valid TOML: {error}") from error
    table = content.get("symphony", {})
    if not isinstance(table, dict):
        raise ConfigError(f"{FLAG_PREFIX}config {path}: [symphony] is not a table")
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag a setting; only what the user names ends up in the namespace."""
    group = parser.add_argument_group("symphony", "settings of symphony_sglang")
    group.add_argument(
        f"{FLAG_PREFIX}config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="TOML file with a [symphony] table; flags and SYMPHONY_* variables beat it",
    )
    for item in dataclasses.fields(SymphonyConfig):
        rule: Setting = item.metadata["setting"]
        options: dict[str, Any] = {
            "help": rule.help,
            "default": argparse.SUPPRESS,
            "dest": f"symphony_{item.name}",
        }
        if isinstance(item.default, bool) and not item.default:
            group.add_argument(flag_name(item.name), action="store_true", **options)
        elif isinstance(item.default, bool):
            options["action"] = argparse.BooleanOptionalAction
            group.add_argument(flag_name(item.name), **options)
        else:
            metavar = rule.metavar or None
            group.add_argument(flag_name(item.name), metavar=metavar, **options)


def from_arguments(
    namespace: argparse.Namespace, environment: Mapping[str, str]
) -> tuple[SymphonyConfig, Path | None]:
    """The resolved record of a namespace that ``add_arguments`` filled, and the file it named."""
    given = vars(namespace)
    path = given.get("symphony_config") or environment.get(f"{ENVIRONMENT_PREFIX}CONFIG")
    file = Path(path) if path else None
    names = {item.name for item in dataclasses.fields(SymphonyConfig)}
    flags = {
        name: given[f"symphony_{name}"] for name in sorted(names) if f"symphony_{name}" in given
    }
    return SymphonyConfig.resolve(flags, environment, file), file


REFERENCE_PREAMBLE = f"""# Flags of a worker

Written from `symphony_sglang.config`; a test compares them.

`python -m symphony_sglang.launch_server` takes every flag of SGLang's server unchanged, and these.
A flag beats its environment variable, which beats the key in the `[symphony]` table of the file
that `{FLAG_PREFIX}config FILE` (or `{ENVIRONMENT_PREFIX}CONFIG`) names, which beats the default.
The key is the variable's name in lower case without its prefix. A value out of range stops the
start with a message that names the flag, the value and the range. Sizes are per tensor-parallel
rank, in units of 10^9 bytes.

| flag | environment | default | range | what it does |
|---|---|---|---|---|
"""


def reference() -> str:
    """``docs/reference/flags.md``."""
    return REFERENCE_PREAMBLE + settings_rows(SymphonyConfig, flag_name, environment_name)


def settings_rows(
    owner: type, flag_of: Callable[[str], str], environment_of: Callable[[str], str]
) -> str:
    """A table row for each setting of a dataclass, by the names that its parser gives them."""
    rows = []
    for item in dataclasses.fields(owner):
        rule: Setting = item.metadata["setting"]
        flag = flag_of(item.name)
        if item.default is True:
            spelling = f"`{flag}`, `--no-{flag.removeprefix('--')}`"
        elif item.default is False:
            spelling = f"`{flag}`"
        else:
            spelling = f"`{flag} {rule.metavar or item.name.rsplit('_', 1)[-1].upper()}`"
        cells = (
            spelling,
            f"`{environment_of(item.name)}`",
            f"`{format_value(item.default)}`" if item.default not in ("", ()) else "",
            range_text(item).strip(),
            rule.help.replace("|", "\\|"),
        )
        rows.append(f"| {' | '.join(cells)} |\n")
    return "".join(rows)
