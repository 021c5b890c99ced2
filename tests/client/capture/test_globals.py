"""Loading without trust: what the allow-list lets in, what it refuses and what it says then."""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from cairn.capture.globals import ALLOWED_GLOBALS, load, outside_allow_list
from cairn.capture.plan import plan
from cairn_api.errors import ConfigurationError
from tests.client.capture.images import assert_same, image_of

numpy = pytest.importorskip("numpy")


class Custom:
    """A class nobody trusts."""


def numpy_state() -> dict[str, Any]:
    return {
        "scalar": numpy.float64(1.5),
        "random": numpy.random.RandomState(0).get_state(),
        "args": argparse.Namespace(lr=0.1),
        "weight": torch.ones(3),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "image.pt"


@pytest.mark.parametrize("mmap", [False, True])
def test_allowed_python_objects_load(path: Path, mmap: bool) -> None:
    path.write_bytes(image_of(numpy_state()))
    assert outside_allow_list(plan(numpy_state()).globals) == ()
    restored = load(path, map_location="cpu", weights_only=True, mmap=mmap)
    assert restored["scalar"] == 1.5
    assert restored["random"][0] == "MT19937"
    assert (restored["random"][1] == numpy_state()["random"][1]).all()
    assert restored["args"] == argparse.Namespace(lr=0.1)


def test_open_files_load_from_where_they_stand() -> None:
    file = BytesIO(image_of(numpy_state()))
    assert_same(load(file, weights_only=True)["weight"], torch.ones(3))


def test_strangers_are_refused_by_name_and_loaded_on_request(path: Path) -> None:
    state = {"c": Custom(), "w": torch.ones(2)}
    path.write_bytes(image_of(state))
    name = f"{Custom.__module__}.Custom"
    assert name in outside_allow_list(plan(state).globals)
    with pytest.raises(ConfigurationError, match="Custom") as raised:
        load(path, weights_only=True)
    assert "weights_only=False" in raised.value.hint
    assert isinstance(load(path, weights_only=False)["c"], Custom)


def test_the_users_own_trust_counts_and_is_left_alone(path: Path) -> None:
    state = [Custom(), argparse.Namespace(a=1)]
    path.write_bytes(image_of(state))
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([Custom, argparse.Namespace]):
        assert f"{Custom.__module__}.Custom" not in outside_allow_list(plan(state).globals)
        assert isinstance(load(path, weights_only=True)[0], Custom)
        assert set(torch.serialization.get_safe_globals()) == before | {Custom, argparse.Namespace}
    assert set(torch.serialization.get_safe_globals()) == before


def test_loads_in_several_threads_share_the_list(path: Path) -> None:
    path.write_bytes(image_of([argparse.Namespace(a=i) for i in range(200)]))
    before = set(torch.serialization.get_safe_globals())
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                assert len(load(path, weights_only=True)) == 200
        except BaseException as error:  # noqa: BLE001 - handed to the test below
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.deepspeed
@pytest.mark.filterwarnings("default")
def test_deepspeed_objects_load_in_a_process_that_never_imported_it(path: Path) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler  # noqa: PLC0415
    from deepspeed.runtime.zero.config import ZeroStageEnum  # noqa: PLC0415
    from deepspeed.utils.tensor_fragment import fragment_address  # noqa: PLC0415

    state = {
        "scaler": LossScaler(scale=2.0),
        "stage": ZeroStageEnum.gradients,
        "address": fragment_address(numel=3, start=4),
        "kind": DynamicLossScaler,
        "tensor": torch.arange(3),
    }
    assert outside_allow_list(plan(state).globals) == ()
    path.write_bytes(image_of(state))
    script = (
        "import sys; from cairn.capture.globals import load; assert 'deepspeed' not in sys.modules;"
        "state = load(sys.argv[1], weights_only=True);"
        "assert state['scaler'].cur_scale == 2.0 and state['stage'] == 2 and state['address'].start == 4"
    )
    finished = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_allowed_names_are_no_torch_names() -> None:
    # torch's own list is consulted as it is in the installed version; copying it here would let it go stale.
    assert not [name for name in ALLOWED_GLOBALS if name.startswith(("torch.", "collections.", "builtins."))]
