"""The router's settings: sglang-router's flags with its defaults, and a few of ours.

Every setting has a flag (``--queue-size``), an environment twin
(``SYMPHONY_ROUTER_QUEUE_SIZE``) and a key in a TOML file (``queue_size``, under ``[router]``, named
by ``--symphony-config``). A flag beats the environment, which beats the file, which beats the
default. A flag of sglang-router that has no effect here is refused with the reason, as is an
unknown one: nothing is accepted and ignored.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symphony_sglang.config import setting, settings_rows
from symphony_sglang.errors import ConfigError, UnsupportedError

ENVIRONMENT_PREFIX = "SYMPHONY_ROUTER_"
# The names of ``core.routing.make_policy``; a test compares them.
POLICIES = (
    "symphony", "symphony-paper", "session_sticky", "cache_aware", "round_robin", "random",
    "power_of_two",
)  # fmt: skip
LOG_LEVELS = ("debug", "info", "warn", "error")
NEVER = 10**9


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """All settings. Durations are in the unit that the name ends with."""

    # Where it listens, and its workers.
    host: str = setting("0.0.0.0", "address to listen on")
    port: int = setting(30000, "port to listen on", minimum=1, maximum=65535)
    worker_urls: tuple[str, ...] = setting((), "URLs of the workers", metavar="URL")
    worker_startup_timeout_secs: int = setting(
        1800, "a worker that does not come up in this time is forgotten", minimum=1, maximum=NEVER
    )
    worker_startup_check_interval: int = setting(
        30, "longest pause between checks of a worker that starts", minimum=1, maximum=3600
    )
    # Placement.
    policy: str = setting("symphony", f"how workers are chosen: {', '.join(POLICIES)}")
    cache_threshold: float = setting(
        0.3, "cache_aware: least matched share of a prompt", minimum=0.0, maximum=1.0
    )
    balance_abs_threshold: int = setting(
        64, "cache_aware: lead in requests at which load is uneven", minimum=0, maximum=NEVER
    )
    balance_rel_threshold: float = setting(
        1.5, "cache_aware: and by what factor", minimum=1.0, maximum=1e6
    )
    eviction_interval_secs: int = setting(
        60, "cache_aware: how often the tree is cut back", minimum=1, maximum=NEVER
    )
    max_tree_size: int = setting(
        2**26, "cache_aware: characters kept for each worker", minimum=1, maximum=2**40
    )
    max_idle_secs: int = setting(
        14400, "session_sticky: how long an idle session keeps its worker", minimum=1, maximum=NEVER
    )
    dp_aware: bool = setting(False, "place on data-parallel ranks, not on servers only")
    model_path: str = setting("", "model whose tokenizer gives exact page hashes", metavar="PATH")
    tokenizer_path: str = setting("", "tokenizer, where it is not the model's", metavar="PATH")
    chat_template: str = setting("", "file of a chat template to use instead", metavar="FILE")
    trust_remote_code: bool = setting(False, "let the tokenizer bring code of its own")
    # Moves of sessions between workers.
    disable_migration: bool = setting(False, "never move a session to another worker")
    drain_timeout_secs: int = setting(
        300, "a draining worker is removed after this time at the latest", minimum=1, maximum=NEVER
    )
    # Limits.
    max_payload_size: int = setting(
        512 * 2**20, "largest request body in bytes", minimum=1024, maximum=2**40
    )
    request_timeout_secs: int = setting(
        1800, "longest time for a whole answer", minimum=1, maximum=NEVER
    )
    shutdown_grace_period_secs: int = setting(
        180, "how long running requests may go on after SIGTERM", minimum=0, maximum=NEVER
    )
    max_concurrent_requests: int = setting(
        -1, "requests at a time; -1: no limit", minimum=-1, maximum=NEVER
    )
    queue_size: int = setting(
        100, "requests that wait beyond them; others get 429", minimum=0, maximum=1_000_000
    )
    queue_timeout_secs: int = setting(
        60, "longest wait; then the answer is 408", minimum=1, maximum=NEVER
    )
    rate_limit_tokens_per_second: int = setting(
        0, "requests a second; 0: no limit", minimum=0, maximum=NEVER
    )
    advise_rate: float = setting(
        200.0,
        "advisories a second that one caller may send on average; beyond it callers get 429",
        minimum=0.1,
        maximum=1e6,
    )
    advise_tokens: int = setting(
        67_108_864,
        "tokens that the live advisories of one caller may hold; beyond it callers get 429",
        minimum=1,
        maximum=10**12,
    )
    # Keys.
    api_key: str = setting("", "key that callers must send", metavar="KEY")
    admin_api_key: str = setting("", "key of control routes", metavar="KEY")
    worker_api_key: str = setting(
        "", "key towards workers; default: the caller's is passed on", metavar="KEY"
    )
    control_plane_api_keys: tuple[str, ...] = setting(
        (), "more keys of control routes, as id:name:role:key", metavar="KEY"
    )
    control_plane_audit_enabled: bool = setting(False, "log calls of control routes")
    cors_allowed_origins: tuple[str, ...] = setting(
        (), "origins whose pages may call; default: all", metavar="ORIGIN"
    )
    # TLS.
    tls_cert_path: str = setting("", "certificate of the router (PEM)", metavar="FILE")
    tls_key_path: str = setting("", "its private key (PEM)", metavar="FILE")
    client_cert_path: str = setting("", "certificate shown to workers (PEM)", metavar="FILE")
    client_key_path: str = setting("", "its private key (PEM)", metavar="FILE")
    ca_cert_paths: tuple[str, ...] = setting(
        (), "authorities that vouch for workers (PEM)", metavar="FILE"
    )
    # Logs and metrics.
    log_level: str = setting("info", f"one of {', '.join(LOG_LEVELS)}")
    log_dir: str = setting("", "directory for a log file", metavar="DIR")
    prometheus_port: int = setting(
        29000, "port of the metrics; 0: only /metrics on the main port", minimum=0, maximum=65535
    )
    prometheus_host: str = setting("0.0.0.0", "address of the metrics")
    request_id_headers: tuple[str, ...] = setting(
        ("x-request-id", "x-correlation-id", "x-trace-id", "request-id"),
        "headers that may hold a caller's request id, best first",
        metavar="NAME",
    )
    # Retries.
    retry_max_retries: int = setting(5, "tries after the first", minimum=0, maximum=100)
    retry_initial_backoff_ms: int = setting(50, "first wait", minimum=0, maximum=NEVER)
    retry_max_backoff_ms: int = setting(30_000, "longest wait", minimum=0, maximum=NEVER)
    retry_backoff_multiplier: float = setting(
        1.5, "growth of the wait with each try", minimum=1.0, maximum=100.0
    )
    retry_jitter_factor: float = setting(
        0.2, "share of a wait that is chance", minimum=0.0, maximum=1.0
    )
    disable_retries: bool = setting(False, "never try again")
    # Health checks.
    health_failure_threshold: int = setting(
        3, "failed checks in a row that make a worker unhealthy", minimum=1, maximum=1000
    )
    health_success_threshold: int = setting(
        2, "good checks in a row that make it healthy again", minimum=1, maximum=1000
    )
    health_check_timeout_secs: int = setting(5, "longest check", minimum=1, maximum=3600)
    health_check_interval_secs: int = setting(60, "pause between checks", minimum=1, maximum=NEVER)
    health_check_endpoint: str = setting("/health", "path of the check")
    disable_health_check: bool = setting(False, "check workers only when they start")
    # Circuit breaker.
    cb_failure_threshold: int = setting(
        10, "failures in a row that open the breaker", minimum=1, maximum=NEVER
    )
    cb_success_threshold: int = setting(
        3, "successes that close it again", minimum=1, maximum=NEVER
    )
    cb_timeout_duration_secs: int = setting(60, "how long it stays open", minimum=1, maximum=NEVER)
    cb_window_duration_secs: int = setting(
        120, "time within which the failures must come", minimum=1, maximum=NEVER
    )
    disable_circuit_breaker: bool = setting(False, "never stop sending to a failing worker")

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            check_range(item, getattr(self, item.name), flag_name(item.name))
        one_of("--policy", self.policy, POLICIES)
        one_of("--log-level", self.log_level, LOG_LEVELS)
        for pair in (("tls_cert_path", "tls_key_path"), ("client_cert_path", "client_key_path")):
            given = [name for name in pair if getattr(self, name)]
            if len(given) == 1:
                other = pair[1 - pair.index(given[0])]
                raise ConfigError(f"{flag_name(given[0])} is given without {flag_name(other)}")
        for key in self.control_plane_api_keys:
            parts = key.split(":", 3)
            if len(parts) != 4 or parts[2] not in ("admin", "user") or not parts[3]:
                raise ConfigError(
                    "--control-plane-api-keys: expected id:name:role:key with role admin or user"
                )
        if not self.health_check_endpoint.startswith("/"):
            raise ConfigError(
                f"--health-check-endpoint is {self.health_check_endpoint!r}; expected a path like "
                "/health"
            )

    @property
    def admin_keys(self) -> tuple[str, ...]:
        """Every key that opens control routes."""
        others = [key.split(":", 3) for key in self.control_plane_api_keys]
        admins = [parts[3] for parts in others if parts[2] == "admin"]
        return tuple(key for key in (self.admin_api_key, *admins) if key)


KUBERNETES = (
    "Kubernetes service discovery is not supported; name workers with --worker-urls or POST "
    "/workers"
)
DISAGGREGATION = "prefill-decode disaggregation is not supported; workers do both"
HISTORY = "answers of /v1/responses are kept by the workers; the router has no history store"
PARSERS = "the workers parse; give this flag to them"
JWT = "JWT is not supported; use --admin-api-key or --control-plane-api-keys"
TOKENIZER_CACHE = "the router keeps each session's tokens by itself, in bounded memory"
TRACING = "OpenTelemetry tracing is not supported; see /metrics"
# Flags of sglang-router that have no effect here, and why.
UNSUPPORTED: dict[str, str] = {
    "--mini-lb": DISAGGREGATION,
    "--pd-disaggregation": DISAGGREGATION,
    "--prefill": DISAGGREGATION,
    "--decode": DISAGGREGATION,
    "--prefill-policy": DISAGGREGATION,
    "--decode-policy": DISAGGREGATION,
    "--prefill-selector": DISAGGREGATION,
    "--decode-selector": DISAGGREGATION,
    "--bucket-adjust-interval-secs": "there is no bucket policy",
    "--service-discovery": KUBERNETES,
    "--selector": KUBERNETES,
    "--service-discovery-port": KUBERNETES,
    "--service-discovery-namespace": KUBERNETES,
    "--enable-igw": "several models are told apart by the names that their workers serve",
    "--assignment-mode": "new sessions go to the least loaded worker (--policy session_sticky)",
    "--prometheus-duration-buckets": "the buckets of durations are fixed",
    "--backend": "only SGLang workers are supported",
    "--history-backend": HISTORY,
    "--mcp-config-path": "MCP tools are not supported",
    "--reasoning-parser": PARSERS,
    "--tool-call-parser": PARSERS,
    "--tokenizer-cache-enable-l0": TOKENIZER_CACHE,
    "--tokenizer-cache-l0-max-entries": TOKENIZER_CACHE,
    "--tokenizer-cache-enable-l1": TOKENIZER_CACHE,
    "--tokenizer-cache-l1-max-memory": TOKENIZER_CACHE,
    "--enable-trace": TRACING,
    "--otlp-traces-endpoint": TRACING,
    "--jwt-issuer": JWT,
    "--jwt-audience": JWT,
    "--jwt-jwks-uri": JWT,
    "--jwt-role-mapping": JWT,
    **dict.fromkeys(
        (
            "--oracle-wallet-path", "--oracle-tns-alias", "--oracle-connect-descriptor",
            "--oracle-username", "--oracle-password", "--oracle-pool-min", "--oracle-pool-max",
            "--oracle-pool-timeout-secs", "--postgres-db-url", "--postgres-pool-max",
            "--redis-url", "--redis-pool-max", "--redis-retention-days",
        ),
        HISTORY,
    ),
}  # fmt: skip


def flag_name(name: str, prefix: str = "") -> str:
    return f"--{prefix}{name.replace('_', '-')}"


def one_of(flag: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{flag} is {value!r}; expected one of {', '.join(known)}")


def check_range(item: dataclasses.Field[Any], value: Any, source: str) -> None:
    """Refuse a number outside the field's range, naming the flag, the value and the range."""
    rule = item.metadata["setting"]
    if isinstance(value, bool) or not isinstance(value, int | float) or rule.minimum is None:
        return
    if not rule.minimum <= value <= rule.maximum:
        raise ConfigError(
            f"{source} is {value:g}; expected a number from {rule.minimum:g} to {rule.maximum:g}"
        )


def convert(item: dataclasses.Field[Any], value: Any, source: str) -> Any:
    """`value`, from a file or a variable, as the type of the field's default."""
    kind: Any = type(item.default)
    if kind is tuple:
        words = value.split() if isinstance(value, str) else value
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ConfigError(f"{source} is {value!r}; expected a list of texts")
        return tuple(words)
    if kind is bool:
        known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if str(value).lower() not in known:
            raise ConfigError(f"{source} is {value!r}; expected a boolean (1 or 0)")
        return known[str(value).lower()]
    if kind is str:
        if not isinstance(value, str):
            raise ConfigError(f"{source} is {value!r}; expected text")
        return value
    try:
        if isinstance(value, bool):
            raise ValueError
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{source} is {value!r}; expected {what}") from None
    check_range(item, number, source)
    return number


def add_arguments(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """One flag a setting; only what the user names ends up in the namespace."""
    group = parser.add_argument_group("router", "settings of the router")
    for item in dataclasses.fields(RouterSettings):
        rule = item.metadata["setting"]
        options: dict[str, Any] = {
            "dest": f"router_{item.name}",
            "default": argparse.SUPPRESS,
            "help": f"{rule.help} (default: {shown_default(item)})".replace("%", "%%"),
        }
        if isinstance(item.default, bool):
            options["action"] = "store_true"
        elif isinstance(item.default, tuple):
            options |= {"nargs": "*", "metavar": rule.metavar}
        else:
            options["metavar"] = rule.metavar or type(item.default).__name__.upper()
        group.add_argument(flag_name(item.name, prefix), **options)
    group.add_argument(
        f"--{prefix}symphony-config",
        dest="router_config_file",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="TOML file with a [router] table; flags and SYMPHONY_ROUTER_* variables beat it",
    )


def shown_default(item: dataclasses.Field[Any]) -> str:
    if isinstance(item.default, tuple):
        return " ".join(item.default) or "none"
    return str(item.default) if item.default != "" else "none"


def refuse_unsupported(words: Sequence[str], prefix: str = "") -> None:
    """Raises:
    UnsupportedError: a flag of sglang-router that has no effect here.
    """
    for word in words:
        name = word.split("=")[0]
        plain = "--" + name.removeprefix(f"--{prefix}") if prefix else name
        if plain in UNSUPPORTED and name.startswith(f"--{prefix}"):
            raise UnsupportedError(f"{name}: {UNSUPPORTED[plain]}")


def parse_arguments(
    argv: Sequence[str], environment: Mapping[str, str] | None = None, prefix: str = ""
) -> RouterSettings:
    """The settings of a command line.

    Raises:
        ConfigError: an unknown flag, or a value out of range.
        UnsupportedError: a flag of sglang-router that has no effect here.
    """
    refuse_unsupported(argv, prefix)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_arguments(parser, prefix)
    try:
        namespace, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    if rest:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(rest[0].split("=")[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; see --help"
        raise ConfigError(f"unknown argument {rest[0]!r}{hint}")
    return resolve(vars(namespace), os.environ if environment is None else environment, prefix)


def resolve(
    given: Mapping[str, Any], environment: Mapping[str, str], prefix: str = ""
) -> RouterSettings:
    """Merge flags (as `add_arguments` names them), variables, file and defaults."""
    path = given.get("router_config_file") or environment.get("SYMPHONY_CONFIG")
    known = {item.name: item for item in dataclasses.fields(RouterSettings)}
    values: dict[str, Any] = {}
    for name, value in (read_table(Path(path)) if path else {}).items():
        if name not in known:
            raise ConfigError(f"{path}: [router] has an unknown setting {name!r}")
        values[name] = convert(known[name], value, f"{path}: {name}")
    for name, item in known.items():
        variable = ENVIRONMENT_PREFIX + name.upper()
        if variable in environment:
            values[name] = convert(item, environment[variable], variable)
        flag = given.get(f"router_{name}")
        if flag is not None:
            values[name] = convert(item, flag, flag_name(name, prefix))
    return RouterSettings(**values)


def read_table(path: Path) -> dict[str, Any]:
    """The ``[router]`` table of a TOML file."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--symphony-config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--symphony-config {path}: not valid TOML: {error}") from error
    table = content.get("router", {})
    if not isinstance(table, dict):
        raise ConfigError(f"--symphony-config {path}: [router] is not a table")
    return table


def reference() -> str:
    """The page ``docs/reference/router.md``: every flag, and those of sglang-router we refuse."""
    lines = [
        "# Flags of the router",
        "",
        "`python -m symphony_sglang.launch_router` and `symphony router` take these; so does",
        "`symphony cluster`, each with `--router-` before its name. A flag beats its environment",
        "variable, which beats its key in the `[router]` table of `--symphony-config FILE`.",
        "",
        "| flag | environment | default | range | |",
        "|---|---|---|---|---|",
    ]
    rows = settings_rows(RouterSettings, flag_name, lambda name: ENVIRONMENT_PREFIX + name.upper())
    lines.append(rows)
    lines += [
        "## Flags of sglang-router that stop the start",
        "",
        "| flag | why |",
        "|---|---|",
        *(f"| `{flag}` | {reason} |" for flag, reason in sorted(UNSUPPORTED.items())),
    ]
    return "\n".join(lines) + "\n"
