"""All contenders by name, in the order of the tables."""

from __future__ import annotations

from collections.abc import Mapping

from tests.perf.cairn_contenders import Cairn, CairnOverlapped, CairnTier2
from tests.perf.contender import Contender
from tests.perf.dcp_contenders import DcpAsync, DcpAsyncProcess, DcpAsyncShared, DcpSave, TorchSnapshot
from tests.perf.file_contenders import Safetensors, SafetensorsFsync, TorchSave, TorchSaveFsync

_KINDS: tuple[type[Contender], ...] = (
    Cairn, CairnOverlapped, CairnTier2,
    TorchSave, TorchSaveFsync, Safetensors, SafetensorsFsync,
    DcpSave, DcpAsync, DcpAsyncShared, DcpAsyncProcess, TorchSnapshot,
)  # fmt: skip

CONTENDERS: Mapping[str, type[Contender]] = {kind.name: kind for kind in _KINDS}

BY_DEFAULT: Mapping[str, tuple[str, ...]] = {
    "adam": tuple(CONTENDERS),
    # The others take two minutes a round with all of them: left out is what differs little from one that stays.
    "flat": tuple(name for name, kind in CONTENDERS.items() if kind not in {CairnTier2, TorchSaveFsync, DcpAsync}),
    "small": tuple(name for name, kind in CONTENDERS.items() if kind not in {CairnTier2, TorchSaveFsync, DcpAsync}),
}
"""Who takes part in which state unless names are given."""

PEERS = tuple(name for name, kind in CONTENDERS.items() if not issubclass(kind, Cairn))
