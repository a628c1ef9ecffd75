"""The router's command line: sglang-router's flags and defaults, and clear refusals."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

import pytest

from symphony_sglang.cli import main
from symphony_sglang.cluster import plan_cluster
from symphony_sglang.core.routing_policies import POLICIES as CORE_POLICIES
from symphony_sglang.errors import ConfigError, UnsupportedError
from symphony_sglang.router.arguments import (
    POLICIES,
    UNSUPPORTED,
    RouterSettings,
    flag_name,
    parse_arguments,
    reference,
)

# Where we differ from sglang-router on purpose, and what it has instead.
OTHER_DEFAULTS = {"--policy": "cache_aware", "--request-id-headers": None}


def stock_actions() -> dict[str, argparse.Action]:
    from sglang_router.router_args import RouterArgs

    parser = argparse.ArgumentParser(add_help=False)
    RouterArgs.add_cli_args(parser)
    return {option: action for action in parser._actions for option in action.option_strings}


def test_every_flag_of_sglang_router_works_or_is_refused_with_a_reason() -> None:
    ours = {flag_name(item.name): item for item in dataclasses.fields(RouterSettings)}
    stock = stock_actions()
    assert set(stock) - set(ours) - set(UNSUPPORTED) == set()
    assert not set(ours) & set(UNSUPPORTED)
    assert set(UNSUPPORTED) <= set(stock)
    for flag, action in stock.items():
        if flag not in ours:
            continue
        expected = OTHER_DEFAULTS.get(flag, action.default)
        default = ours[flag].default
        if flag in OTHER_DEFAULTS:
            assert default != expected
        elif isinstance(default, tuple):
            assert tuple(expected or ()) == default, flag
        else:
            # Their None is our empty text, or 0.
            assert default == (type(default)() if expected is None else expected), flag


@pytest.mark.parametrize("flag", sorted(UNSUPPORTED))
def test_unsupported_flags_stop_the_start(flag: str) -> None:
    with pytest.raises(UnsupportedError, match=flag):
        parse_arguments([flag, "x"], {})


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--policy", "best"], "best"), (["--queue-size", "-1"], "queue-size"),
     (["--queue-size", "x"], "queue-size"), (["--port", "99999"], "port"),
     (["--cache-threshold", "nan"], "cache-threshold"), (["--polcy", "x"], "--policy"),
     (["--tls-cert-path", "a"], "tls-key-path"), (["stray"], "stray"),
     (["--control-plane-api-keys", "a:b"], "control-plane"), (["--log-level", "loud"], "loud")],
)  # fmt: skip
def test_wrong_values_are_named(words: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_arguments(words, {})


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "symphony.toml"
    file.write_text("[symphony]\nhost_gb = 1\n[router]\nport = 1\nqueue_size = 2\nhost = 'a'\n")
    words = ["--symphony-config", str(file), "--port", "3"]
    environment = {"SYMPHONY_ROUTER_PORT": "4", "SYMPHONY_ROUTER_QUEUE_SIZE": "5"}
    settings = parse_arguments(words, environment)
    assert (settings.port, settings.queue_size, settings.host) == (3, 5, "a")
    assert settings.retry_max_retries == 5
    file.write_text("[router]\nunknown = 1\n")
    with pytest.raises(ConfigError, match="unknown"):
        parse_arguments(words, {})


def test_lists_and_switches() -> None:
    words = ["--worker-urls", "http://a:1", "http://b:2", "--dp-aware", "--disable-retries"]
    settings = parse_arguments(words, {})
    assert settings.worker_urls == ("http://a:1", "http://b:2")
    assert settings.dp_aware
    assert settings.disable_retries
    keys = ["--control-plane-api-keys", "1:ci:admin:secret", "2:read:user:other"]
    assert parse_arguments([*keys, "--admin-api-key", "own"], {}).admin_keys == ("own", "secret")


def test_policies_are_those_of_the_core() -> None:
    assert set(POLICIES) == set(CORE_POLICIES)
    assert RouterSettings().policy == "symphony"


def test_cluster_splits_flags_between_router_and_workers(tmp_path: Path) -> None:
    plan = plan_cluster(
        [
            "--model-path", "m", "--workers", "2", "--port", "4000", "--api-key", "k",
            "--router-policy", "round_robin", "--tp", "1", "--symphony-nvme-dir", str(tmp_path),
        ]
    )  # fmt: skip
    assert plan.port == 4000
    assert len(plan.workers) == 2
    for number, words in enumerate(plan.workers):
        assert str(tmp_path / f"worker-{number}") in words
        assert words[words.index("--tp") : words.index("--tp") + 2] == ("--tp", "1")
        assert "k" in words
        assert "round_robin" not in words
    settings = parse_arguments(plan.router, {})
    assert settings.policy == "round_robin"
    assert settings.api_key == "k"
    assert len(settings.worker_urls) == 2
    with pytest.raises(UnsupportedError):
        plan_cluster(["--model-path", "m", "--router-service-discovery"])
    with pytest.raises(ConfigError):
        plan_cluster(["--model-path", "m", "--workers", "0"])


def test_the_command_line_reaches_the_router(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["router", "--policy", "best"]) == 2
    assert "best" in capsys.readouterr().err


def test_reference_page_is_up_to_date() -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "reference" / "router.md"
    if os.environ.get("SYMPHONY_UPDATE_DOCS"):
        path.write_text(reference())
    assert path.read_text() == reference(), "run this test with SYMPHONY_UPDATE_DOCS=1"
