"""The checkpoint engine that DeepSpeed calls. What DeepSpeed does around those calls is in ``wrapping``."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from cairn.agreement import error_to_json, first_error
from cairn.integrations.deepspeed import swap
from cairn.integrations.deepspeed.guarding import guard_training
from cairn.integrations.deepspeed.jobs import LINKER, Job, job_for, settle
from cairn.integrations.deepspeed.marks import Kind
from cairn.integrations.deepspeed.preallocating import sizes_of
from cairn.integrations.deepspeed.states import Loading, load_file
from cairn.save import Checkpoint
from cairn.settings import ClientSettings
from cairn_api.errors import CairnError, ConfigurationError, SaveFailedError
from cairn_api.names import VersionId

log = logging.getLogger("cairn")


@dataclass(slots=True)
class Call:
    """The method of ``DeepSpeedEngine`` that is running."""

    save_dir: str
    save_latest: bool = False
    plain_files: bool = False
    """``save_16bit_model``: its one file is for other programs, so there is no version."""
    training: Any = None
    """The ``DeepSpeedEngine`` that saves its own state, when it does."""


@dataclass(slots=True)
class Saving:
    """What lies between DeepSpeed's ``create`` and ``commit``."""

    tag: str
    save_dir: str
    """Resolved: it is an attribute of the version."""
    folder: Path
    """``save_dir/tag`` as DeepSpeed spells it."""
    job: Job
    checkpoint: Checkpoint | None
    """None when only plain files are written."""
    save_latest: bool
    names: list[str] = field(default_factory=list)
    failure: Exception | None = None
    """What went wrong with a plain file on this rank."""

    def name_of(self, path: str) -> str | None:
        """The partition that a file of DeepSpeed's becomes, or None for one that does not belong to the version."""
        name = os.path.relpath(path, self.folder)
        return None if self.checkpoint is None or name.startswith(os.pardir) else name


class CairnCheckpointEngine(CheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no type annotations
    """DeepSpeed's checkpoint engine on top of a Cairn client.

    ``save`` records a failure and returns; ``commit`` raises it, as :class:`SaveFailedError`, on **every** rank, so
    that no rank waits for ever in DeepSpeed's own collectives and ``latest`` never names what was not saved.
    """

    def __init__(self, config_params: object, settings: ClientSettings) -> None:
        super().__init__(config_params)
        self.name = type(self).__name__
        self.settings = settings
        self._call: Call | None = None
        self._saving: Saving | None = None
        self._loading: Loading | None = None
        self._unprepared = job_for(settings, "").client if settings.job else None
        """Whose buffers are made before the first save. A job without a name is not known before that."""

    # What the wrapped methods of DeepSpeedEngine tell

    @contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """While *call* runs. A save that it leaves open, because it failed, is aborted."""
        self._call = call
        try:
            yield
        except BaseException as error:
            self.abandon(f"the training script failed: {type(error).__name__}: {error}")
            raise
        finally:
            self._call = None

    @contextmanager
    def loading(self, loading: Loading) -> Iterator[None]:
        """While DeepSpeed loads what *loading* has chosen."""
        self._loading = loading
        try:
            yield
        finally:
            self._loading = None
            loading.close()

    def prepare(self, training: Any) -> None:
        """Have the buffers of the first save of *training* made in the background, once; that may fail.

        One for each partition: the second is made after that save, and a training that never saves holds no more.
        """
        client, self._unprepared = self._unprepared, None
        if client is None:
            return
        try:
            client.preallocate(sizes_of(training), buffers=1)
        except Exception as error:  # noqa: BLE001 - no reason to stop a training: its first save is slower, that is all
            log.info("no capture buffers are made ahead, so the first save will be slower: %r", error)

    def abandon(self, reason: str) -> None:
        """Abort a save that was created and not committed."""
        saving, self._saving = self._saving, None
        if saving is not None and saving.checkpoint is not None:
            saving.checkpoint.abort(reason)

    # What DeepSpeed calls

    def create(self, info: Any) -> None:
        """Begin a save (collective). *info* is a ``CheckpointCommitInfo``, or the tag alone in older DeepSpeed.

        Raises on every rank what keeps all ranks from saving: different tags, no free buffer, an earlier failure.
        """
        self.abandon("the program never committed it")
        tag, directory = self._identify(info)
        save_dir = os.path.realpath(directory)
        job = job_for(self.settings, save_dir)
        call = self._call
        checkpoint = None
        if call is None or not call.plain_files:
            checkpoint = job.client.create(tag, save_dir, file_marks=True, raise_immediately=False)
            if call is not None and self.settings.capture == "overlapped":
                guard_training(job.client, call.training)
        save_latest = call is not None and call.save_latest
        self._saving = Saving(tag, save_dir, Path(directory, tag), job, checkpoint, save_latest)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder, except the version's own: that one appears whole, in ``commit``."""
        if self._saving is None or self._saving.name_of(path) != os.curdir:
            Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Copy *state_dict*; it may change as soon as this returns. A path outside the tag's folder becomes a file.

        With overlapped capture, what only the optimizer's step changes is copied before the next step.
        """
        saving = self._saving
        if saving is None:
            _write_file(state_dict, path)
            return
        name = saving.name_of(path)
        if name is not None and saving.checkpoint is not None:
            saving.names.append(name)
            saving.checkpoint.save(name, state_dict)
            return
        try:
            _write_file(state_dict, path)
        except Exception as error:  # noqa: BLE001 - whatever it is, every rank hears of it in commit
            log.warning("writing %s failed: %s", path, error)
            saving.failure = saving.failure or error

    def commit(self, info: Any) -> bool:
        """Agree with all ranks that everything is saved (collective), and show it in ``save_dir``.

        With overlapped capture this returns at once, and all of it happens while training goes on.
        """
        tag, _ = self._identify(info)
        saving, self._saving = self._saving, None
        if saving is None or saving.tag != tag:
            if saving is not None and saving.checkpoint is not None:
                saving.checkpoint.abort(f"the program committed {tag!r} instead")
            raise ConfigurationError(
                f"commit of {tag!r} without a create", hint="call create, save and commit in order"
            )
        if saving.checkpoint is None:
            self._finish(saving)
        else:
            saving.checkpoint.conclude(partial(self._finish, saving))
        return True

    def _finish(self, saving: Saving) -> None:
        client = saving.job.client
        said = {"names": saving.names, "error": error_to_json(saving.failure)}
        try:
            gathered = client.ranks.all_gather(f"saved for {saving.tag}", said, self.settings.commit_timeout_s)
        except CairnError as error:
            if saving.checkpoint is not None:
                saving.checkpoint.abort(error.message)
            raise
        problem = first_error(gathered)
        names_by_rank: list[list[str]] = [item["names"] for item in gathered]
        if saving.checkpoint is not None and (problem is not None or not any(names_by_rank)):
            saving.checkpoint.abort("nothing was saved" if problem is None else problem.message)
            saving.checkpoint = None
        if problem is not None:
            raise SaveFailedError(problem.message, hint=problem.hint or "make room or fix the path, then save again")
        version = None if saving.checkpoint is None else saving.checkpoint.commit()
        if version is not None:
            self._show(saving, version, names_by_rank)

    def load(self, path: str, map_location: Any = None) -> Any:
        """The state saved under *path*: from the version that is being loaded, or whatever lies there."""
        if self._loading is not None:
            found = self._loading.load(path, map_location)
            if found is not None:
                return found
        settle()
        return load_file(self.settings, path, map_location)

    def is_decoupled(self) -> bool:
        """False: when ``save`` returns, the state is copied, and DeepSpeed need not hold it back."""
        return False

    def preserves_storage_sharing(self) -> bool:
        """False: capture never stores more of a storage than is used, so DeepSpeed need not clone first."""
        return False

    def _identify(self, info: Any) -> tuple[str, str]:
        if isinstance(info, str):
            if self._call is None:
                raise ConfigurationError(
                    f"where {info!r} is saved to is not known", hint="save through DeepSpeedEngine.save_checkpoint"
                )
            return info, self._call.save_dir
        return str(info.tag), str(info.save_dir)

    def _show(self, saving: Saving, version: VersionId, names_by_rank: list[list[str]]) -> None:
        """Files and ``latest``. The version is safe already: what fails here is told, and does not end the training."""
        save_dir = saving.job.save_dir(saving.save_dir)
        try:
            if save_dir.in_charge:
                save_dir.show_saved(version, names_by_rank)
                if save_dir.kind is not Kind.PLACEHOLDER:
                    LINKER.expect(save_dir, version)
            if saving.job.rank == 0 and saving.save_latest:
                swap.write_whole(Path(saving.save_dir) / "latest", saving.tag)
        except OSError as error:
            log.warning(
                "version %s is saved, but %s could not be brought up to date: %s", version, save_dir.path, error
            )


def _write_file(state_dict: Any, path: str) -> None:
    """``torch.save`` to *path*, which is never seen half-written."""
    target = Path(path)
    temporary = swap.hidden_beside(target)
    try:
        with temporary.open("wb") as file:
            torch.save(state_dict, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
