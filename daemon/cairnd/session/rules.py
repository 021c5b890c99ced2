"""What a save may consist of: rules about names, ranks and sizes, without state and without effect."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

from cairn_api.errors import ConfigurationError
from cairn_api.names import BY_RANK_FOLDER, MAX_EPOCH, VersionId, check_partition
from cairnd.manifest import MAX_WORLD_SIZE
from cairnd.model import Version

MAX_PARTITIONS = 100_000
"""Per version and node."""
MAX_TEXT_BYTES = 4096
"""Of a path, a URL, a nonce: they are kept in memory and on disk for as long as the version or the job exists."""
MAX_TEXTS_BYTES = 1024 * 1024
"""Of all of a version's attributes, or of all globals of a partition, together."""
MAX_REASON_LENGTH = 1000
"""Characters of a reason that somebody gave; the rest is cut off."""


def check_claim(epoch: int, nonce: str, world_size: int) -> None:
    """An epoch that can be claimed: later ones exist, and versions can be named by it."""
    if not 1 <= epoch < MAX_EPOCH:
        raise ConfigurationError(
            f"epoch {epoch} is not from 1 to {MAX_EPOCH - 1}", hint="claim the one after max_epoch"
        )
    if not 0 < world_size <= MAX_WORLD_SIZE:
        raise ConfigurationError(f"a world of {world_size} ranks is not valid", hint="pass the launch's world_size")
    check_text("nonce", nonce)


def check_text(what: str, text: str) -> None:
    """*text* may be kept."""
    if len(text) > MAX_TEXT_BYTES:
        raise ConfigurationError(f"{what} has {len(text)} characters", hint=f"pass at most {MAX_TEXT_BYTES}")


def check_texts(what: str, texts: Iterable[str]) -> None:
    """*texts*, which are kept together, may be."""
    size = sum(map(len, texts))
    if size > MAX_TEXTS_BYTES:
        raise ConfigurationError(f"the {what} have {size} characters", hint=f"pass at most {MAX_TEXTS_BYTES} in all")


def check_created(save_dir: str, attributes: Mapping[str, str], node_ranks: Sequence[int], world_size: int) -> None:
    """What a rank says of a version that it opens."""
    check_text("save_dir", save_dir)
    if "\0" in save_dir:
        raise ConfigurationError("save_dir holds a NUL character", hint="pass a path that the system can open")
    check_texts("attributes", (*attributes, *attributes.values()))
    if len(node_ranks) > world_size or any(rank >= world_size for rank in node_ranks):
        raise ConfigurationError(f"node_ranks are not ranks of a world of {world_size}", hint="pass each rank once")


def check_launch(
    job: str, version_id: VersionId, *, rank: int, world_size: int, nonce: str, claimed: tuple[int, str]
) -> None:
    """A version belongs to the epoch and nonce that the rank's launch has *claimed*."""
    if not 0 < world_size <= MAX_WORLD_SIZE or not 0 <= rank < world_size:
        raise ConfigurationError(f"rank {rank} of {world_size} is not valid", hint="pass rank and world_size")
    if not nonce or (version_id.epoch, nonce) != claimed:
        raise ConfigurationError(
            f"version {version_id} does not belong to the epoch that this rank's launch has claimed",
            hint="call ClaimEpoch before creating versions",
            context={"job": job, "version": version_id},
        )


def check_same_launch(known: Version, *, nonce: str, world_size: int) -> None:
    """Who joins a version is a rank of the launch that opened it."""
    if known.nonce != nonce or known.world_size != world_size:
        raise ConfigurationError(
            f"version {known.id} belongs to another launch of job {known.job!r}",
            hint="let the ranks of one launch agree through one process group; start the job again",
            context={"job": known.job, "version": known.id},
        )


def check_new(
    version: Version, rank: int, name: str, size_bytes: int, *, prepared: Collection[int], received: int
) -> None:
    """A partition may be added to *version*, of which ranks *prepared* are complete and *received* ones are here."""
    check_partition(name)
    if name.split("/", maxsplit=1)[0] == BY_RANK_FOLDER:
        raise ConfigurationError(
            f"partition name {name!r} is not allowed: names below {BY_RANK_FOLDER}/ are Cairn's", hint="rename it"
        )
    if not 0 <= rank < version.world_size:
        raise ConfigurationError(f"rank {rank} is outside a world of {version.world_size}")
    if rank in prepared:
        raise ConfigurationError(f"rank {rank} has prepared version {version.id} and cannot add to it")
    if size_bytes <= 0:
        raise ConfigurationError(f"partition {name!r} is empty", hint="a torch.save file has at least a header")
    if received >= MAX_PARTITIONS:
        raise ConfigurationError(f"version {version.id} has more than {MAX_PARTITIONS} partitions")


def check_paths(paths: Sequence[str]) -> None:
    """Refuse paths of which one would have to be a file and a folder at once."""
    # In this order what lies below a folder comes right after it. Names may have hundreds of parts: a set of all
    # folders would take gigabytes.
    ordered = sorted(f"{path}/" for path in paths)
    for folder, following in pairwise(ordered):
        if following != folder and following.startswith(folder):
            path = folder[:-1]
            raise ConfigurationError(
                f"partition {path!r} cannot lie beside partitions below {path}/", hint="rename one of them"
            )


def clash(names: Sequence[str]) -> bool:
    """Whether partitions of these names could not lie side by side without further names being agreed on."""
    try:
        check_paths(names)
    except ConfigurationError:
        return True
    return len(names) != len(set(names))
