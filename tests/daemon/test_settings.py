"""Settings: where a value comes from, what it may be, and what is said when it may not."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from cairn_api.errors import ConfigurationError
from cairnd.__main__ import EXIT_CONFIGURATION, main
from cairnd.settings import Settings, load_settings

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "deploy" / "cairnd.example.toml"


def load(arguments: list[str], environment: dict[str, str] | None = None, toml: str = "", *, tmp: Path) -> Settings:
    config = tmp / "cairnd.toml"
    config.write_text(toml)
    return load_settings([f"--config={config}", *arguments], environment or {})


def test_defaults_hold_without_anything() -> None:
    assert load_settings([], {}) == Settings()


def test_a_flag_beats_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    toml, environment = 'tier1_path = "/file"', {"CAIRN_TIER1_PATH": "/environment"}
    assert load([], {}, toml, tmp=tmp_path).tier1_path == "/file"
    assert load([], environment, toml, tmp=tmp_path).tier1_path == "/environment"
    assert load(["--tier1-path", "/flag"], environment, toml, tmp=tmp_path).tier1_path == "/flag"


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("upload_concurrency = 9")
    assert load_settings([], {"CAIRN_CONFIG": str(config)}).upload_concurrency == 9


SPELLED: dict[str, tuple[str, str, object]] = {
    # name: as text (environment, flag), as TOML, the value
    "capture_memory_bytes": ("4096", "4096", 4096),
    "tier2_keep_period_s": ("1.5", "1.5", 1.5),
    "lease_s": ("10", "10", 10.0),
    "protect_files": ("true", "true", True),
    "log_level": ("debug", '"debug"', "debug"),
    "allowed_uids": ("1000,1001", "[1000, 1001]", (1000, 1001)),
    "storage_options": ("a=1,b=2", '["a=1", "b=2"]', ("a=1", "b=2")),
}


@pytest.mark.parametrize("name", SPELLED)
def test_every_type_reads_the_same_from_everywhere(name: str, tmp_path: Path) -> None:
    text, toml, value = SPELLED[name]
    flag = "--" + name.replace("_", "-")
    for settings in (
        load([], {}, f"{name} = {toml}", tmp=tmp_path),
        load([], {"CAIRN_" + name.upper(): text}, tmp=tmp_path),
        load([flag, text], tmp=tmp_path),
    ):
        assert getattr(settings, name) == value
        assert type(getattr(settings, name)) is type(value)


def test_false_and_empty_lists_can_be_said(tmp_path: Path) -> None:
    settings = load(["--protect-files", "0", "--allowed-uids", ""], {}, "protect_files = true", tmp=tmp_path)
    assert settings.protect_files is False
    assert settings.allowed_uids == ()


@pytest.mark.parametrize(
    ("name", "toml"),
    [
        ("capture_memory_bytes", "1.5"), ("capture_memory_bytes", "true"), ("capture_memory_bytes", '"much"'),
        ("capture_memory_bytes", "[1]"), ("capture_memory_bytes", "-1"), ("upload_concurrency", "2.0"),
        ("upload_concurrency", "0"), ("lease_s", "0"), ("lease_s", "-1"), ("lease_s", "nan"), ("lease_s", "inf"),
        ("lease_s", "true"), ("commit_timeout_s", "0"), ("drain_timeout_s", "inf"), ("tier2_delete_grace_s", "-0.1"),
        ("tier2_delete_grace_s", "nan"), ("tier2_keep_period_s", "-1"), ("tier2_keep_every", "-1"),
        ("tier1_limit_bytes", "-1"), ("tier1_write_bytes_per_s", "-1"), ("drain_threads", "0"),
        ("drain_threads", "33"), ("recheck_one_in", "0"), ("pass_over_after_resumes", "65"),
        ("tier2_num_of_version_in_retention", "-1"), ("num_of_version_in_retention", "0"),
        ("protect_files", "2"), ("protect_files", "1"), ("protect_files", '"yes"'), ("protect_files", "[]"),
        ("allowed_uids", "[1.5]"), ("allowed_uids", "[true]"), ("allowed_uids", "[[1]]"), ("allowed_uids", "7"),
        ("allowed_uids", '"root"'), ("storage_options", "[1]"), ("storage_options", '["endpoint"]'),
        ("allowed_storage_locations", "{a = 1}"), ("tier1_path", "5"), ("tier1_path", '"relative"'),
        ("runtime_dir", '""'), ("persistent_storage_path", '"/plain/path"'), ("verify_on_load", '"never"'),
        ("log_format", '"xml"'), ("log_level", '"LOUD"'), ("log_level", "3"), ("lease_s", "2020-01-01"),
    ],
)  # fmt: skip
def test_what_is_not_valid_is_named_with_what_would_be(name: str, toml: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load([], {}, f"{name} = {toml}", tmp=tmp_path)
    assert name in caught.value.message
    assert name in caught.value.hint


@pytest.mark.parametrize("written", ["teir1_path", "num_of_versions_in_retention", "allowed_uid"])
def test_an_unknown_name_in_the_file_is_refused_with_the_nearest(written: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=written) as caught:
        load([], {}, f"{written} = 1", tmp=tmp_path)
    assert re.search(r"did you mean '(tier1_path|num_of_version_in_retention|allowed_uids)'", caught.value.hint)


def test_an_unknown_flag_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="--teir1-path") as caught:
        load_settings(["--teir1-path=/x"], {})
    assert "'--tier1-path'" in caught.value.hint
    with pytest.raises(ConfigurationError, match="zzz"):
        load_settings(["zzz"], {})


def test_a_flag_is_not_abbreviated() -> None:
    with pytest.raises(ConfigurationError, match="--tier1"):
        load_settings(["--tier1", "/x"], {})


@pytest.mark.parametrize("text", ["tier1_path = ", "\x00", "[", 'a = "\ud800"'])
def test_a_file_that_is_no_toml_is_refused(text: str, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ConfigurationError, match=r"c\.toml"):
        load_settings(["--config", str(config)], {})


def test_a_missing_file_is_refused_and_the_daemon_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(tmp_path / "none.toml")]) == EXIT_CONFIGURATION
    assert "none.toml" in capsys.readouterr().err


def test_half_of_the_memory_is_the_default_budget() -> None:
    assert Settings(capture_memory_bytes=4096).capture_limit_bytes() == 4096
    assert Settings().capture_limit_bytes() > 0
    assert Settings(storage_options=("a=b=c",)).store_options() == {"a": "b=c"}


def test_the_example_lists_every_setting_with_its_default_in_order() -> None:
    text = EXAMPLE.read_text()
    written: dict[str, Any] = tomllib.loads(text)
    assert list(written) == [item.name for item in fields(Settings)]
    assert load_settings(["--config", str(EXAMPLE)], {}) == Settings()
    for name in written:  # each has a comment above it that says what it is
        assert re.search(rf"^# .*\n{name} = ", text, re.MULTILINE), f"{name} has no comment"
