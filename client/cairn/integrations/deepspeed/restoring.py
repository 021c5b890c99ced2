"""Which version a DeepSpeed engine loads: decided by all ranks together, and put where DeepSpeed looks."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from cairn.agreement import error_to_json, first_error
from cairn.choice import Candidate, Reads, every_partition
from cairn.integrations.deepspeed import swap
from cairn.integrations.deepspeed.folders import Wanted
from cairn.integrations.deepspeed.jobs import Job, job_for
from cairn.integrations.deepspeed.marks import is_plain_checkpoint
from cairn.integrations.deepspeed.states import Loading
from cairn.load import Restored
from cairn.settings import ClientSettings
from cairn_api.errors import CairnError, ConfigurationError, VersionError
from cairn_api.names import parse_version

log = logging.getLogger("cairn")

_SHARD = re.compile(r"(?:^|/)(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_")
"""DeepSpeed's names of what belongs to one data-parallel rank (``DeepSpeedEngine._get_zero_ckpt_name``)."""

_DISTANCES = ("", "memory", "tier1", "peer", "tier2")


def choose(settings: ClientSettings, load_dir: str, tag: str | None, *, whole: bool) -> Loading | None:
    """The version to load, fetched and shown in *load_dir* on every node (collective).

    None means that DeepSpeed shall load plain files, or find that there are none. With *tag* None it is the newest
    version saved from *load_dir*, whatever ``latest`` says; if there is none, plain files; if there are none either,
    the job's newest version. A *tag* is loaded or reported missing, never replaced. With *whole* every file of the
    version will be readable without Cairn, because DeepSpeed is about to read some directly.

    Raises :class:`VersionError` on every rank when versions are known but cannot be read.
    """
    if not settings.enable_load:
        return None
    directory = os.path.realpath(load_dir)
    job = job_for(settings, directory)
    reads = every_partition if whole else read_by_rank
    restored = _newest(job, directory, reads) if tag is None else _tagged(job, directory, tag, reads)
    if restored is None:
        return None
    loading = Loading(settings, job, restored, Path(load_dir, restored.candidate.version.tag))
    try:
        _show(loading, directory, set_latest=tag is None, whole=whole)
    except BaseException:
        loading.close()
        raise
    return loading


def read_by_rank(candidate: Candidate, rank: int) -> Iterable[str]:
    """What DeepSpeed will read on *rank*: everything but the shards of other data-parallel ranks."""
    own = {_shard_of(part.name) for part in candidate.parts.values() if part.rank == rank}
    names = {part.name for part in candidate.parts.values()}
    wanted = (name for name in names if _shard_of(name) is None or _shard_of(name) in own)
    return {candidate.path_of(name, rank) or name for name in wanted}


def _shard_of(name: str) -> int | None:
    match = _SHARD.search(name)
    return int(match[1]) if match else None


def _newest(job: Job, directory: str, reads: Reads) -> Restored | None:
    client = job.client
    source = client.settings.load_path
    restored = None if source else client.restore(save_dir=directory, reads=reads)
    plain = _latest_plain(Path(directory))
    if restored is not None:
        if plain is not None and job.rank == 0:
            log.warning(
                "loading %s although `latest` names %s, which Cairn did not save; pass tag=%r to load that one",
                restored.candidate.version, plain, plain.name,
            )  # fmt: skip
        return restored
    gathered = client.ranks.all_gather("plain files", plain is not None, client.settings.collective_timeout_s)
    if all(gathered) and not source:
        return None
    restored = client.restore(reads=reads)
    if restored is None and source:
        raise VersionError(
            f"load_path is {source}, and no version of job {client.settings.job!r} is there",
            hint="name the tier 2 folder that holds the job's own folder, or remove load_path",
        )
    if restored is not None and job.rank == 0:
        found = restored.candidate
        log.warning("nothing was saved from %s; loading %s, saved from %s", directory, found.version, found.save_dir)
    return restored


def _tagged(job: Job, directory: str, tag: str, reads: Reads) -> Restored | None:
    client = job.client
    said: dict[str, Any] = {
        "here": False,
        "plain": is_plain_checkpoint(Path(directory) / tag),
        "tag": tag,
        "error": None,
    }
    try:
        said["here"] = any(
            parse_version(item["version"]).tag == tag and item["save_dir"] == directory for item in client.versions()
        )
    except CairnError as error:
        said["error"] = error_to_json(error)  # raised on every rank below, not on this one alone
    gathered = client.ranks.all_gather("looking for a tag", said, client.settings.collective_timeout_s)
    if (problem := first_error(gathered)) is not None:
        raise problem
    if any(item["tag"] != tag for item in gathered):
        raise ConfigurationError(
            f"the ranks ask for different tags: {', '.join(item['tag'] for item in gathered)}",
            hint="pass the same tag to load_checkpoint on every rank",
        )
    if any(item["here"] for item in gathered):
        return _present(client.restore(tag, save_dir=directory, reads=reads), tag)
    if all(item["plain"] for item in gathered):
        return None
    return _present(client.restore(tag, reads=reads), tag)


def _present(restored: Restored | None, tag: str) -> Restored:
    if restored is None:
        raise VersionError(f"there is no version of {tag!r}", hint="run `cairn list`")
    return restored


def _latest_plain(directory: Path) -> Path | None:
    """The plain checkpoint folder that ``latest`` names, if it does."""
    try:
        tag = (directory / "latest").read_text().strip()
    except OSError:
        return None
    return directory / tag if tag and is_plain_checkpoint(directory / tag) else None


def _show(loading: Loading, directory: str, *, set_latest: bool, whole: bool) -> None:
    """Put the files of the version, and ``latest``, where DeepSpeed looks for them; all ranks go on together."""
    job, restored = loading.job, loading.restored
    candidate, source = restored.candidate, job.client.settings.load_path
    save_dir = job.save_dir(directory)
    error: CairnError | None = None
    try:
        if save_dir.in_charge:
            files = {}
            for name in {part.name for part in candidate.parts.values()}:
                path = restored.path_of(name, job.rank)
                files[name] = Wanted(path, open_bytes=partial(restored.open, path) if whole else None)
            save_dir.show(candidate.version, files, source)
            save_dir.repair()
            if set_latest and _text(save_dir.path / "latest") != candidate.version.tag:
                swap.write_whole(save_dir.path / "latest", candidate.version.tag)
    except OSError as raised:
        error = ConfigurationError(
            f"the files of {candidate.version} cannot be put into {directory}: {raised}",
            hint="load from a folder that the training may write to",
        )
    except CairnError as raised:
        error = raised
    said = {"error": error_to_json(error), "tier": restored.from_tier}
    gathered = job.client.ranks.all_gather("showing files", said, job.client.settings.collective_timeout_s)
    if (problem := first_error(gathered)) is not None:
        raise problem from error
    if job.rank == 0:
        # What one rank has brought from afar is near for the next one of its node.
        farthest = max((item["tier"] for item in gathered), key=_DISTANCES.index)
        log.info("loading %s from %s", candidate.version, farthest)


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
