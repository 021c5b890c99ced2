"""The states of one version as DeepSpeed asks for them: by file path, some of them twice."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from cairn.capture.globals import load as torch_load
from cairn.choice import merge
from cairn.integrations.deepspeed.jobs import Job, job_for
from cairn.integrations.deepspeed.marks import is_placeholder, read_marks
from cairn.load import Restored
from cairn.settings import ClientSettings
from cairn_api.errors import ConfigurationError, VersionError


class Loading:
    """A fetched version while DeepSpeed loads it."""

    def __init__(self, settings: ClientSettings, job: Job, restored: Restored, folder: Path) -> None:
        self.job = job
        self.restored = restored
        self._settings = settings
        self._folder = folder
        self._fetched_later: list[Restored] = []
        self._kept: tuple[str, Any] | None = None

    @property
    def tag(self) -> str:
        """The tag of the chosen version."""
        return self.restored.candidate.version.tag

    def load(self, path: str, map_location: Any) -> Any | None:
        """The state that DeepSpeed knows as file *path*, private to the caller; None when the version has no such file.

        DeepSpeed loads each model file twice in a row, first only to look at its keys. The second of two such calls
        gets what was read for the first.
        """
        name = os.path.relpath(path, self._folder)
        part = self.restored.candidate.path_of(name, self.job.rank)
        if part is None:
            return None
        if not _means_cpu(map_location):
            return self._read(part, map_location)
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] == part:
            return kept[1]
        state = self._read(part, "cpu")
        self._kept = (part, state)
        return _fresh(state)

    def close(self) -> None:
        """Let go of the version."""
        self._kept = None
        for restored in (self.restored, *self._fetched_later):
            restored.close()

    def _read(self, path: str, map_location: Any) -> Any:
        restored = self.restored
        if path not in restored.paths:
            restored = self.job.client.fetch(restored.candidate, [path])
            self._fetched_later.append(restored)
        return restored.load(path, map_location=map_location, weights_only=self._settings.weights_only)


def load_file(settings: ClientSettings, path: str, map_location: Any) -> Any:
    """What lies under *path*: an ordinary torch file, or a placeholder, whose bytes come from Cairn. Not collective."""
    file = Path(path)
    if not is_placeholder(file):
        return torch_load(path, map_location=map_location, weights_only=settings.weights_only)
    marks = read_marks(file.parent)
    if marks is None or file.name not in marks.files or not settings.enable_load:
        raise ConfigurationError(
            f"{path} is a placeholder of Cairn, and "
            + ("enable_load is false" if not settings.enable_load else "the marker beside it is missing"),
            hint=f"run: head {path}",
        )
    job = job_for(settings, str(file.parent.parent))
    known = merge([{"versions": job.client.versions(marks.source or None)}])
    candidate = next((item for item in known if item.version == marks.version and job.name == marks.job), None)
    if candidate is None:
        raise VersionError(
            f"{path} belongs to version {marks.version} of job {marks.job}, which job {job.name} cannot reach",
            hint=f"run `cairn list --job {marks.job}`",
        )
    part = marks.files[file.name].path
    with job.client.fetch(candidate, [part], source=marks.source or None) as restored:
        return restored.load(part, map_location=map_location, weights_only=settings.weights_only)


def _means_cpu(map_location: Any) -> bool:
    """Whether tensors land on the CPU. None counts while a version is loaded: DeepSpeed then only looks at the keys."""
    if map_location is None:
        return True
    if callable(map_location):
        storage = object()
        return map_location(storage, "cuda:0") is storage  # `lambda storage, location: storage`
    return torch.device(map_location).type == "cpu"


def _fresh(value: Any) -> Any:
    """The same tensors in new containers: DeepSpeed takes some of what it loads apart."""
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _fresh(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_fresh(item) for item in value)
    return value
