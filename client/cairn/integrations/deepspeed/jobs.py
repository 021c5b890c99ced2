"""The clients of this process, one per job, shared by all DeepSpeed engines in it."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from cairn.client import Client, connect
from cairn.integrations.deepspeed.linking import Linker
from cairn.integrations.deepspeed.save_dir import SaveDir, Tier1
from cairn.settings import ClientSettings

_LONGEST_NAME = 64
_DIGEST_DIGITS = 10


def derived_job(directory: str) -> str:
    """The job of a training that names none: from the folder it saves to, the same in every launch.

    >>> derived_job("/checkpoints/llama 7b")
    'llama-7b-...'
    """
    path = os.path.realpath(directory)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).name).lstrip("._-")[:_LONGEST_NAME]
    return f"{name or 'job'}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:_DIGEST_DIGITS]}"


@dataclass(slots=True)
class Job:
    """A connected client, and what the integration keeps beside it."""

    client: Client
    name: str
    nodes: tuple[str, ...]
    """The node of each rank."""
    _save_dirs: dict[str, SaveDir] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """This rank."""
        return self.client.ranks.rank

    def save_dir(self, path: str) -> SaveDir:
        """The folder *path* (resolved) as this job shows itself there."""
        if path not in self._save_dirs:
            tier1 = Tier1(self.client.daemon.tier1_path, self.name)
            mode = self.client.settings.save_dir_files
            self._save_dirs[path] = SaveDir(path, self.name, tier1, mode, self.rank, self.nodes)
        return self._save_dirs[path]


def wait_copied() -> None:
    """Wait until every byte that the engines of this process have saved is copied."""
    for job in list(_JOBS.values()):
        job.client.wait_copied()


def settle() -> None:
    """Wait until everything that the engines of this process have saved is committed and shown, or has failed."""
    for job in list(_JOBS.values()):
        job.client.settle()


_JOBS: dict[ClientSettings, Job] = {}
LINKER = Linker()


def job_for(settings: ClientSettings, directory: str) -> Job:
    """The client for what is saved to or loaded from *directory*, connected on first use (collective then).

    Raises as :func:`cairn.connect` does.
    """
    named = replace(settings, job=settings.job or derived_job(directory))
    if named not in _JOBS:
        client = connect(**asdict(named))
        nodes = client.ranks.all_gather("naming nodes", client.daemon.node, named.collective_timeout_s)
        _JOBS[named] = Job(client, named.job, tuple(nodes))
    return _JOBS[named]
