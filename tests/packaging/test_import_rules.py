"""Imports go one way. The checker is itself checked: each planted violation must be found, by name and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packaging.imports import API, CLIENT, DAEMON, Package, autoload_violations, violations

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("package", "root"), [(DAEMON, "daemon"), (CLIENT, "client"), (API, "proto")], ids=["cairnd", "cairn", "cairn_api"]
)
def test_sources_keep_the_rules(package: Package, root: str) -> None:
    assert list((REPOSITORY / root / package.name).rglob("*.py")), "nothing to check"
    assert "\n".join(violations(package, REPOSITORY / root)) == ""


def test_the_autoload_module_is_standard_library() -> None:
    assert not autoload_violations(REPOSITORY / "client" / "cairn_autoload.py")


def plant(root: Path, name: str, source: str) -> None:
    """Write a module; its folders become packages."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("cairnd/model.py", "import torch\n", "never turns bytes into objects"),
        ("cairnd/model.py", "def f():\n    import torch.nn\n", "model.py:2"),
        ("cairnd/model.py", "import cairn\n", "cairn is not open to it"),
        ("cairnd/model.py", "from cairn.client import connect\n", "cairn is not open to it"),
        ("cairnd/model.py", "import numpy\n", "numpy is not open to it"),
        ("cairnd/model.py", "import pickle\n", "never turns bytes into objects"),
        ("cairnd/model.py", "from multiprocessing import Queue\n", "never turns bytes into objects"),
        ("cairnd/model.py", "import importlib\nimportlib.import_module('dill')\n", "never turns bytes into objects"),
        ("cairnd/model.py", "__import__('torch')\n", "never turns bytes into objects"),
        ("cairnd/model.py", "eval('1')\n", "makes code out of data"),
        ("cairnd/session/saves.py", "import grpc\n", "grpc is not open to it"),
        ("cairnd/session/saves.py", "from cairn_api.v1 import save_pb2\n", "may touch wire types"),
        ("cairnd/session/saves.py", "from cairn_api import v1\n", "may touch wire types"),
        ("cairnd/session/saves.py", "from cairnd.rpc import server\n", "rpc lies above session"),
        ("cairnd/session/saves.py", "from cairnd import rpc\n", "rpc lies above session"),
        ("cairnd/session/saves.py", "from ..rpc import server\n", "rpc lies above session"),
        ("cairnd/session/__init__.py", "from ..rpc import server\n", "rpc lies above session"),
        ("cairnd/session/saves.py", "if TYPE_CHECKING:\n    import cairnd.app\n", "app lies above"),
        ("cairnd/cli/main.py", "from cairnd.rpc import server\n", "rpc lies beside cli"),
        ("cairnd/rpc/server.py", "from cairnd.app import App\n", "app lies above rpc"),
        ("cairnd/rpc/server.py", "import rich\n", "rich is not open to it"),
        ("cairnd/rpc/server.py", "from cairnd.core import Core\n", "rpc must not know core"),
        ("cairnd/core.py", "from cairnd.rpc import server\n", "rpc lies above core"),
        ("cairnd/catalog/catalog.py", "from cairnd.replication import bucket\n", "replication lies above catalog"),
        ("cairnd/tiers/local.py", "from cairnd.model import Version\n", "tiers must not know model"),
        ("cairnd/tiers/local.py", "from cairnd.manifest import encode\n", "tiers must not know manifest"),
        ("cairnd/tiers/local.py", "from cairnd.catalog import catalog\n", "catalog lies above tiers"),
        ("cairnd/layout.py", "from cairnd.tiers.local import LocalTier\n", "tiers lies above layout"),
        ("cairnd/stray.py", "", "no layer is given to cairnd.stray"),
        ("cairnd/model.py", "import cairnd.stray\n", "no layer is given to"),
    ],
)
def test_planted_violations_in_the_daemon_are_found(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    plant(tmp_path, file, source)
    found = violations(DAEMON, tmp_path)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("cairn/save.py", "import cairnd\n", "cairnd is not open to it"),
        ("cairn/save.py", "import fsspec\n", "fsspec is not open to it"),
        ("cairn/save.py", "import deepspeed\n", "deepspeed is not open to it"),
        ("cairn/save.py", "from cairn_api.v1 import save_pb2\n", "may touch wire types"),
        ("cairn/transport/calls.py", "from cairn.save import Save\n", "save lies above transport"),
        ("cairn/client.py", "from cairn.integrations import deepspeed\n", "integrations lies above client"),
    ],
)
def test_planted_violations_in_the_client_are_found(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    plant(tmp_path, file, source)
    found = violations(CLIENT, tmp_path)
    assert len(found) == 1
    assert complaint in found[0]


def test_a_circle_is_found(tmp_path: Path) -> None:
    plant(tmp_path, "cairnd/model.py", "from cairnd.manifest import encode\n")
    plant(tmp_path, "cairnd/manifest.py", "def encode():\n    from cairnd import model\n")
    assert "in a circle" in violations(DAEMON, tmp_path)[0]


def test_what_the_rules_allow_is_not_reported(tmp_path: Path) -> None:
    plant(tmp_path, "cairnd/__init__.py", "")
    plant(tmp_path, "cairnd/app.py", "from cairnd.rpc import server\nfrom cairnd import layout, session\n")
    plant(tmp_path, "cairnd/rpc/server.py", "import grpc\nfrom cairn_api.v1 import save_pb2\nfrom ..session import a\n")
    plant(
        tmp_path, "cairnd/session/saves.py", "import json\nfrom cairnd.session import b\nfrom cairn_api import names\n"
    )
    plant(tmp_path, "cairnd/session/memory.py", "import ast\nast.literal_eval('1')\n")
    plant(tmp_path, "cairnd/digests.py", "from cairnd.tiers.filesystem import FileSystem\n")
    assert not violations(DAEMON, tmp_path)


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("import sys\ndef hook():\n    from cairn.integrations import deepspeed\n", True),
        ("from cairn.integrations import deepspeed\n", False),
        ("class Finder:\n    import cairn\n", False),
        ("def hook():\n    import deepspeed\n", False),
        ("import torch\n", False),
    ],
)
def test_planted_violations_in_the_autoload_module_are_found(tmp_path: Path, source: str, *, allowed: bool) -> None:
    plant(tmp_path, "cairn_autoload.py", source)
    assert (not autoload_violations(tmp_path / "cairn_autoload.py")) is allowed
