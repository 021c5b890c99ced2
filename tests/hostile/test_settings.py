"""Configuration that cannot work, for daemon and client: refused before anything starts, with what to do instead."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from cairn.settings import ClientSettings
from cairn.settings import load_settings as load_client_settings
from cairn_api.errors import ConfigurationError
from cairnd.settings import Settings, load_settings
from tests.hostile.bounds import bounded_memory
from tests.hostile.documents import values
from tests.hostile.seeds import SEED
from tests.promises import Evidence, proof_size

pytestmark = pytest.mark.fault

EXAMPLES = proof_size(150, 4_000)

_DAEMON_NAMES = [item.name for item in fields(Settings)]
_CLIENT_NAMES = [item.name for item in fields(ClientSettings)]
_TEXTS = (
    "", "0", "-1", "1", "1e9", "nan", "inf", "-inf", "1e999", "9" * 400, "9" * 5000, "true", "yes", "file:///x", "x",
    "/", "/x", "../x", "/a\0b", "a=b", "=", ",", "1,2", "1,,2", "é", "\udcff", "x" * 100_000, "[", "{", "0x10",
    "1_000", " 5 ",
    "cached", "info", "s3://b/p", "captured", "٣",
)  # fmt: skip
texts = st.one_of(st.sampled_from(_TEXTS), st.text(max_size=10))
toml_values = st.one_of(
    st.sampled_from(
        ("1", "-1", "0", "1.5", "nan", "inf", "-inf", "true", "[]", "[1]", "[true]", '["a", 1]', "{a = 1}", '"x"', "''",
         "1979-05-27", "07:32:00", "9" * 400, "-" + "9" * 400, "9" * 5000, "0x7fffffffffffffffff", '"\\u0000"', "1e308",
         "1e999", '"/a\\u0000b"', "[" * 2000 + "]" * 2000, "[[1]]", '"' + "x" * 100_000 + '"')
    ),
    texts.map(json.dumps),
)  # fmt: skip
toml_lines = st.one_of(
    st.tuples(st.sampled_from(_DAEMON_NAMES), toml_values).map(lambda pair: f"{pair[0]} = {pair[1]}"),
    st.tuples(texts, toml_values).map(lambda pair: f"{json.dumps(pair[0])} = {pair[1]}"),
    st.sampled_from(("[job]", "[[x]]", "a.b = 1", "=", "tier1_path = ", "[" * 5000, "\x00", "# x", "x = {" * 3000)),
)
toml_files = st.one_of(
    st.lists(toml_lines, max_size=4).map(lambda lines: "\n".join(lines).encode(errors="surrogateescape")),
    st.binary(max_size=60),
)


def tried(evidence: Evidence, run: Callable[[], int]) -> None:
    """Run the examples within bounded memory and report their number, whether or not one was answered wrongly."""
    broken = 1
    count = 0
    try:
        with bounded_memory():
            count = run()
        broken = 0
    finally:
        evidence(tried=max(count, broken), broken=broken)


def repeated(test: Callable[..., None]) -> Callable[[], None]:
    """*test*, a test of hypothesis, with this module's number of examples and seed."""
    made = settings(
        max_examples=EXAMPLES, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )(test)  # fmt: skip
    return seed(SEED)(made)


@pytest.mark.promise("bad_input")
@pytest.mark.timeout(120 + EXAMPLES // 10)
def test_the_daemons_settings(tmp_path: Path, evidence: Evidence) -> None:
    config = tmp_path / "cairnd.toml"
    count = 0

    @repeated
    @given(
        toml_files,
        st.dictionaries(st.sampled_from(_DAEMON_NAMES).map(lambda name: f"CAIRN_{name.upper()}"), texts, max_size=2),
        st.lists(
            st.one_of(
                st.tuples(st.sampled_from(_DAEMON_NAMES), texts).map(lambda p: f"--{p[0].replace('_', '-')}={p[1]}"),
                texts,
            ),
            max_size=2,
        ),
    )
    def load(toml: bytes, environment: dict[str, str], arguments: list[str]) -> None:
        nonlocal count
        count += 1
        refused: ConfigurationError | None = None
        status: object = 0
        config.write_bytes(toml)
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                loaded = load_settings([f"--config={config}", *arguments], environment)
        except ConfigurationError as error:
            refused = error
        except SystemExit as ended:  # argparse: a flag without its value, or --help
            status = ended.code
        else:
            for name in ("runtime_dir", "tier1_path"):
                os.fsencode(getattr(loaded, name))
                assert "\0" not in getattr(loaded, name)
            assert loaded.capture_limit_bytes() >= 0
            loaded.store_options()
        assert refused is None or (refused.message and refused.hint)
        assert status in (0, 2)

    def run() -> int:
        load()
        return count

    tried(evidence, run)


@pytest.mark.promise("bad_input")
@pytest.mark.timeout(120 + EXAMPLES // 10)
def test_the_clients_settings(evidence: Evidence) -> None:
    count = 0

    @repeated
    @given(
        st.dictionaries(st.one_of(st.sampled_from(_CLIENT_NAMES), texts), st.one_of(values, texts), max_size=3),
        st.dictionaries(st.sampled_from(_CLIENT_NAMES).map(lambda name: f"CAIRN_{name.upper()}"), texts, max_size=2),
        st.dictionaries(st.one_of(st.sampled_from(_CLIENT_NAMES), texts), values, max_size=3),
    )
    def load(arguments: dict[str, Any], environment: dict[str, str], block: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        refused: ConfigurationError | None = None
        try:
            loaded = load_client_settings(arguments, environment, block)
        except ConfigurationError as error:
            refused = error
        else:
            assert "\0" not in loaded.runtime_dir
            os.fsencode(loaded.runtime_dir)
            for item in fields(ClientSettings):
                value = getattr(loaded, item.name)
                assert value == value, item.name  # noqa: PLR0124 - what is not a number upsets every timer
                assert isinstance(value, (bool, str)) or abs(value) < 2**63, item.name
        assert refused is None or (refused.message and refused.hint)

    def run() -> int:
        load()
        return count

    tried(evidence, run)
