"""The hook in ``import torch``: harmless to everyone, there for who asked for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cairn_autoload
from tests.client.integrations.entry_point import environment, run

WAITING = "any(type(finder).__module__ == 'cairn_autoload' for finder in sys.meta_path)"
FACTORIES = """
import deepspeed.runtime.engine
names = ("deepspeed.runtime.checkpoint_engine.utils", "deepspeed.runtime.checkpoint_engine", "deepspeed.runtime.engine")
made = [sys.modules[name].create_checkpoint_engine for name in names]
"""


def test_a_failing_hook_is_reported_and_does_not_break_import_torch(tmp_path: Path) -> None:
    result = run(
        "import cairn_autoload\n"
        "def watch(): raise RuntimeError('planted')\n"
        "cairn_autoload.watch = watch\n"
        "import torch; print(torch.zeros(2).sum().item())",
        environment(tmp_path),
    )
    assert (result.returncode, result.stdout) == (0, "0.0\n")
    assert result.stderr.count("planted") == 1
    assert "CAIRN_AUTOLOAD=0" in result.stderr


def test_the_harness_would_notice_a_hook_that_raises(tmp_path: Path) -> None:
    (tmp_path / "raising_hook.py").write_text("def register():\n    raise RuntimeError('planted')\n")
    result = run("import torch", environment(tmp_path, "raising_hook:register"))
    assert result.returncode != 0
    assert "planted" in result.stderr


@pytest.mark.parametrize(
    ("switches", "waits"),
    [({}, True), ({"CAIRN_AUTOLOAD": "0"}, False), ({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, False)],
    ids=["on", "off", "off in torch"],
)
def test_import_torch_leaves_only_a_finder_unless_switched_off(
    tmp_path: Path, switches: dict[str, str], *, waits: bool
) -> None:
    result = run(
        f"import json, sys, torch; print(json.dumps([{WAITING}, 'cairn' in sys.modules, 'grpc' in sys.modules]))",
        environment(tmp_path, **switches),
    )
    assert json.loads(result.stdout) == [waits, False, False], result.stderr


def test_the_hook_costs_import_torch_next_to_nothing(tmp_path: Path) -> None:
    result = run(
        "import __future__, json, sys, importlib.metadata, importlib.util\n"
        "before = set(sys.modules)\n"
        "import cairn_autoload; cairn_autoload.register()\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))",
        environment(tmp_path),
    )
    assert json.loads(result.stdout) == ["cairn_autoload"], "what takes time is importing"


@pytest.mark.deepspeed
@pytest.mark.parametrize("first", ["import torch, deepspeed", "import deepspeed, torch"], ids=["torch", "deepspeed"])
def test_deepspeed_without_the_block_never_sees_cairn(tmp_path: Path, first: str) -> None:
    result = run(
        f"import json, sys\n{first}\n{FACTORIES}"
        "class Config: pass\n"
        "config = Config(); config._param_dict = {'cairn': {'enabled': False}}\n"
        "config.checkpoint_config = {'writer': None, 'checkpoint_serialization': True}\n"
        "config.datastates_config = Config(); config.datastates_config.enabled = False\n"
        "engines = [made[0](given, None, 0, False, False) for given in (None, config)]\n"
        f"print(json.dumps([all(hasattr(each, '_cairn_wraps') for each in made), {WAITING}, 'cairn' in sys.modules,\n"
        "    [type(engine).__name__ for engine in engines]]))",
        environment(tmp_path),
    )
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer == [True, False, False, ["TorchCheckpointEngine"] * 2], result.stderr


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    "imports",
    ["import deepspeed\nimport cairn.integrations.deepspeed", "import cairn.integrations.deepspeed\nimport deepspeed"],
    ids=["after deepspeed", "before deepspeed"],
)
def test_the_explicit_form_ends_in_the_same_place(tmp_path: Path, imports: str) -> None:
    result = run(
        f"import json, sys\n{imports}\n{FACTORIES}"
        "import cairn_autoload; cairn_autoload.watch(); cairn_autoload.register()\n"
        "again = sys.modules[names[0]].create_checkpoint_engine\n"
        "print(json.dumps([len(set(made)), again is made[0], hasattr(made[0]._cairn_wraps, '_cairn_wraps')]))",
        environment(tmp_path, CAIRN_AUTOLOAD="0"),
    )
    assert json.loads(result.stdout.splitlines()[-1]) == [1, True, False], result.stderr


@pytest.fixture
def imitation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with DeepSpeed's names and no content, so that each case costs milliseconds; all is undone after."""
    path = list(sys.meta_path)
    package = tmp_path / "deepspeed" / "runtime" / "checkpoint_engine"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "utils.py").write_text("def create_checkpoint_engine(config_params):\n    return 'plain'\n")
    monkeypatch.syspath_prepend(tmp_path)
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "deepspeed"}
    yield package
    sys.meta_path[:] = path
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        del sys.modules[name]
    sys.modules.update(hidden)


def import_factory() -> Any:
    from importlib import import_module  # noqa: PLC0415 - only here is the imitation on the path

    return import_module(cairn_autoload.FACTORY_MODULE).create_checkpoint_engine


@pytest.mark.parametrize(
    "config",
    [
        None,
        SimpleNamespace(),
        SimpleNamespace(_param_dict=None),
        SimpleNamespace(_param_dict={}),
        SimpleNamespace(_param_dict={"cairn": None}),
        SimpleNamespace(_param_dict={"cairn": {"enabled": False}}),
    ],
)
def test_configurations_that_do_not_ask_for_cairn(imitation: Path, config: object) -> None:  # noqa: ARG001 - on the path
    cairn_autoload.register()
    assert import_factory()(config) == "plain"
    assert import_factory()(config_params=config) == "plain"


def test_registering_twice_puts_one_finder_and_the_loader_stays_the_real_one(imitation: Path) -> None:
    cairn_autoload.register()
    cairn_autoload.register()
    assert sum(type(finder).__module__ == "cairn_autoload" for finder in sys.meta_path) == 1
    factory = import_factory()
    assert hasattr(factory, "_cairn_wraps")
    assert not hasattr(factory._cairn_wraps, "_cairn_wraps")
    assert not any(type(finder).__module__ == "cairn_autoload" for finder in sys.meta_path)
    assert sys.modules[cairn_autoload.FACTORY_MODULE].__file__ == str(imitation / "utils.py")


def test_a_deepspeed_without_the_factory_still_imports(imitation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (imitation / "utils.py").write_text("answer = 42\n")
    cairn_autoload.register()
    from importlib import import_module  # noqa: PLC0415 - as above

    assert import_module(cairn_autoload.FACTORY_MODULE).answer == 42
    assert "CAIRN_AUTOLOAD=0" in capsys.readouterr().err


def test_a_deepspeed_without_the_module_fails_as_it_would_without_cairn(imitation: Path) -> None:
    (imitation / "utils.py").unlink()
    cairn_autoload.register()
    with pytest.raises(ModuleNotFoundError, match=r"checkpoint_engine\.utils"):
        import_factory()
