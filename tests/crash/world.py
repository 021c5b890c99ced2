"""A training of several ranks: one process each, a real gloo group, every rank saves partitions of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count, cycle
from pathlib import Path
from typing import Any, Self

import torch
from torch import distributed

import cairn
from cairn.client import Client
from cairn_api.names import VersionId
from tests.crash import oracle, ranks
from tests.crash.trainer import DiaryWriter, Trainer, Trainers, same, state_of

_GLOO_TIMEOUT_S = 60.0
_PROGRESS_S = 60.0
_SHARED = "model.pt"
"""What rank 0 alone saves and every rank reads, as DeepSpeed's model states are."""

_PROMISES = ("captured", "captured", "tier1", "captured", "tier2", "captured")
"""What rank 0 waits for after each save, in turns."""


@dataclass(frozen=True)
class Launch:
    """What the ranks of one launch are told. ``settings`` are those of the client."""

    job: str
    name: str
    world_size: int
    runtime_dir: str
    folder: str
    pause_s: float
    settings: dict[str, Any] = field(default_factory=dict)

    def diary_path(self, rank: int) -> Path:
        """Where *rank* writes down what happens to its job; all launches of a job write on."""
        return Path(self.folder) / f"diary-{self.job}-{rank}"

    @property
    def partitions(self) -> frozenset[str]:
        """What each version has to hold."""
        return frozenset({_SHARED, *(_own(rank) for rank in range(self.world_size))})


def train_rank(rank: int, launch: Launch) -> None:
    """One rank: load the newest version, then save for ever."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{launch.folder}/meeting-{launch.job}-{launch.name}",
        rank=rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=_GLOO_TIMEOUT_S),
    )
    diary = DiaryWriter(launch.diary_path(rank))
    with cairn.connect(job=launch.job, runtime_dir=launch.runtime_dir, **launch.settings) as client:
        _load(client, rank, diary)
        for step, promise in zip(count(), cycle(_PROMISES)):
            tag = f"{launch.name}-s{step}"
            try:
                _save(client, rank, diary, tag, promise if rank == 0 else "captured")
            except cairn.SaveFailedError as error:
                diary.note("failed", f"{tag}: {error}")
            time.sleep(launch.pause_s)


def _own(rank: int) -> str:
    return f"optimizer/rank_{rank}.pt"


def _load(client: Client, rank: int, diary: DiaryWriter) -> None:
    restored = client.restore()
    if restored is None:
        diary.note("afresh", "")
        return
    version = restored.candidate.version
    with restored:
        for name, owner in ((_own(rank), rank), (_SHARED, 0)):
            if not same(restored.load(restored.path_of(name, owner)), state_of(version.tag, name)):
                diary.note("wrong", f"{version} {name}")
                return
    diary.note("loaded", version)


def _save(client: Client, rank: int, diary: DiaryWriter, tag: str, promise: str) -> None:
    checkpoint = client.create(tag)
    diary.note("tried", checkpoint.version)
    for name in (_own(rank), _SHARED) if rank == 0 else (_own(rank),):
        checkpoint.save(name, state_of(tag, name))
    version = checkpoint.commit()
    assert version is not None, "saves are never left out here: the client waits for a buffer"
    diary.note("promised", version)
    if promise != "captured":
        client.wait(version, durability=promise, timeout=_PROGRESS_S)
        diary.note("durable" if promise == "tier1" else "persisted", version)


class World:
    """The ranks of one launch, seen from outside."""

    def __init__(self, launch: Launch, trainers: Trainers) -> None:
        self.launch = launch
        self._diaries = [oracle.Diary.read(launch.diary_path(rank)) for rank in range(launch.world_size)]
        self._begun = [_begun(diary) for diary in self._diaries]
        self._loaded = [len(diary.loaded) for diary in self._diaries]
        self._failed = [len(diary.failed) for diary in self._diaries]
        self._ranks = [trainers.start(train_rank, rank, launch) for rank in range(launch.world_size)]

    @property
    def diaries(self) -> list[oracle.Diary]:
        """What each rank has written so far, in earlier launches too."""
        for rank, diary in enumerate(self._diaries):
            diary.read_on(self.launch.diary_path(rank))
        return self._diaries

    def ended(self) -> list[Trainer]:
        """Ranks that have ended."""
        return [trainer for trainer in self._ranks if not trainer.running]

    def has_begun(self) -> bool:
        """Whether all ranks have loaded what they resume from."""
        return all(_begun(diary) > before for diary, before in zip(self.diaries, self._begun, strict=True))

    def resumed_from(self) -> set[VersionId | None]:
        """What the ranks have loaded in this launch; None for one that began afresh."""
        loaded = (diary.loaded[before:] for diary, before in zip(self.diaries, self._loaded, strict=True))
        return {versions[-1] if versions else None for versions in loaded}

    def failed(self) -> list[str]:
        """Saves of this launch that failed, with the reason; those of the ranks that a dead one left behind too."""
        failed = (diary.failed[before:] for diary, before in zip(self.diaries, self._failed, strict=True))
        return [line for lines in failed for line in lines]

    def promised_everywhere(self) -> set[VersionId]:
        """Versions whose ``commit`` has returned on every rank."""
        return set.intersection(*(diary.promised for diary in self.diaries))

    def wait_begun(self) -> bool:
        """Wait until all ranks have loaded, or one has ended; whether they have loaded."""
        ranks.wait_until(
            lambda: self.has_begun() or bool(self.ended()), "the ranks load", _PROGRESS_S, describe=self.describe
        )
        return self.has_begun()

    def wait_for_a_new_save(self) -> None:
        """Wait until all ranks have committed a version that none of them has begun yet.

        By then each has told the daemon that runs now of everything that it had told an earlier one.
        """
        begun = set[VersionId]().union(*(diary.tried for diary in self.diaries))

        def committed() -> bool:
            assert not self.ended(), f"a rank ended:\n{self.describe()}"
            return not self.promised_everywhere() <= begun

        ranks.wait_until(committed, "the ranks save on", _PROGRESS_S, describe=self.describe)

    def kill_one(self, rank: int, others_after_s: float) -> None:
        """SIGKILL one rank, and the others a moment later, as a launcher does."""
        self._ranks[rank].kill9()
        time.sleep(others_after_s)
        self.kill_all()

    def kill_all(self) -> None:
        """SIGKILL to every rank, then reap."""
        for trainer in self._ranks:
            trainer.kill9()

    def describe(self) -> str:
        """The ends of the ranks' logs."""
        return "\n".join(f"rank {rank}: {trainer.log[-3000:]}" for rank, trainer in enumerate(self._ranks))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill_all()


def _begun(diary: oracle.Diary) -> int:
    return len(diary.loaded) + diary.begun_afresh + len(diary.wrong)
