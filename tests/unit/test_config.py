"""Settings: precedence of the sources, ranges, and messages that name flag, value and range."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from symphony_sglang import config as settings
from symphony_sglang.config import SymphonyConfig
from symphony_sglang.errors import ConfigError
from symphony_sglang.launch_server import split_arguments, wants_cpu


def test_defaults_need_nothing() -> None:
    assert SymphonyConfig.resolve({}, {}) == SymphonyConfig()


def test_flag_beats_environment_beats_file(tmp_path: Path) -> None:
    file = tmp_path / "symphony.toml"
    file.write_text("[symphony]\nhost_gb = 1.0\n")
    assert SymphonyConfig.resolve({}, {}, file).host_gb == 1.0
    environment = {"SYMPHONY_HOST_GB": "2"}
    assert SymphonyConfig.resolve({}, environment, file).host_gb == 2.0
    assert SymphonyConfig.resolve({"host_gb": "3"}, environment, file).host_gb == 3.0


def test_environment_carries_the_record_to_other_processes() -> None:
    record = SymphonyConfig.resolve({"host_gb": "1.5", "off": True}, {})
    assert SymphonyConfig.from_environment(record.to_environment()) == record


@pytest.mark.parametrize("text", ["-0.5", "-2", "1e9", "nan", "inf"])
def test_value_out_of_range_names_flag_value_and_range(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--symphony-host-gb is .*; expected") as error:
        SymphonyConfig.resolve({"host_gb": text}, {})
    assert f"{float(text):g}" in str(error.value)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SYMPHONY_HOST_GB": "lots"}, "SYMPHONY_HOST_GB is 'lots'; expected a number from -1"),
        ({"SYMPHONY_OFF": "perhaps"}, "SYMPHONY_OFF is 'perhaps'; expected a boolean"),
    ],
)
def test_environment_of_the_wrong_type_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        SymphonyConfig.resolve({}, environment)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[symphony]\nhost_bg = 1\n", "unknown setting 'host_bg'"),
        ("[symphony]\nhost_gb = true\n", "host_gb is True; expected a number"),
        ("symphony = 3\n", "is not a table"),
        ("[symphony\n", "not valid TOML"),
    ],
)
def test_broken_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "symphony.toml"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        SymphonyConfig.resolve({}, {}, file)
    assert message in str(error.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        SymphonyConfig.resolve({}, {}, tmp_path / "absent.toml")


def test_our_flags_are_taken_and_the_rest_passes_through() -> None:
    record, rest = split_arguments(
        ["--model-path", "m", "--symphony-host-gb", "2", "--tp", "2", "--symphony-off"]
    )
    assert (record.host_gb, record.off) == (2.0, True)
    assert rest == ["--model-path", "m", "--tp", "2"]


def test_unknown_flag_of_ours_suggests_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"--symphony-host-bg; did you mean --symphony-host-gb"):
        split_arguments(["--symphony-host-bg", "2"])


def test_abbreviated_flag_of_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match="--symphony-host"):
        split_arguments(["--symphony-host", "2"])


@pytest.mark.parametrize(
    ("argv", "cpu"),
    [
        (["--device", "cpu"], True),
        (["--device=cpu"], True),
        (["--device", "cuda"], False),
        ([], False),
    ],
)
def test_device_is_read_before_sglang_is_imported(argv: list[str], cpu: bool) -> None:
    assert wants_cpu(argv) is cpu


def test_every_setting_documents_itself() -> None:
    for item in dataclasses.fields(SymphonyConfig):
        rule: settings.Setting = item.metadata["setting"]
        assert rule.help
        assert settings.flag_name(item.name).startswith("--symphony-")
