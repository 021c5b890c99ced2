"""Settings: one name everywhere, one order of precedence, errors that name the setting."""

from __future__ import annotations

from typing import Any

import pytest

from cairn.settings import ClientSettings, Durability, load_settings
from cairn_api.errors import ConfigurationError


def test_the_block_of_the_documentation_is_accepted() -> None:
    block = {
        "enabled": True,
        "job": "run-7",
        "persistent_storage_path": "s3://bucket/checkpoints",
        "persistent_time_interval": 100,
        "num_of_version_in_retention": 2,
        "enable_load": True,
        "load_path": None,
        "commit_durability": "captured",
        "runtime_dir": "/run/cairn",
    }
    settings = load_settings({}, {}, block)
    assert settings.job == "run-7"
    assert settings.persistent_time_interval == 100.0
    assert settings.load_path == ""
    assert settings.commit_durability == Durability.CAPTURED


def test_an_argument_beats_the_environment_beats_the_block_beats_the_default() -> None:
    environment = {"CAIRN_BUFFERS": "3", "CAIRN_JOB": "from-environment"}
    block = {"buffers": 4, "job": "from-block", "oversize": "fail"}
    settings = load_settings({"job": "from-argument", "buffers": None}, environment, block)
    assert (settings.job, settings.buffers, settings.oversize) == ("from-argument", 3, "fail")
    assert settings.transport == ClientSettings().transport


def test_variables_of_the_daemon_are_left_alone() -> None:
    assert load_settings({}, {"CAIRN_TIER1_PATH": "/nvme", "CAIRN_CONFIG": "x"}) == ClientSettings()


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"persistent_time_intervall": 5}, "'persistent_time_interval'"),
        ({"buffers": 0}, "buffers = 0"),
        ({"buffers": 1.5}, "buffers = 1.5"),
        ({"buffers": True}, "buffers = True"),
        ({"enable_load": "perhaps"}, "enable_load = 'perhaps'"),
        ({"commit_durability": "disk"}, "captured or tier1 or tier2"),
        ({"persistent_time_interval": "often"}, "a number"),
        ({"persistent_time_interval": -1}, "persistent_time_interval = -1"),
        ({"commit_timeout_s": 0}, "more than 0"),
        ({"runtime_dir": "run"}, "an absolute path"),
        ({"load_path": "/no/url"}, "a URL"),
        ({"job": "../x"}, "job '../x'"),
        ({"job": ["a"]}, "a text"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(block: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        load_settings({}, {}, block)
    assert said in str(raised.value)


def test_texts_of_the_environment_become_values() -> None:
    environment = {"CAIRN_ENABLE_LOAD": "off", "CAIRN_PERSISTENT_TIME_INTERVAL": "0", "CAIRN_BUFFERS": "1"}
    settings = load_settings({}, environment)
    assert (settings.enable_load, settings.persistent_time_interval, settings.buffers) == (False, 0.0, 1)
