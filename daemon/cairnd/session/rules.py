"""What a save may consist of: rules about names, ranks and sizes, without state and without effect."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cairn_api.errors import ConfigurationError
from cairn_api.names import BY_RANK_FOLDER, VersionId, check_partition
from cairnd.model import Version

MAX_PARTITIONS = 100_000
"""Per version and node."""
MAX_WORLD_SIZE = 1_000_000


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
    folders = {path[:at] for path in paths for at, character in enumerate(path) if character == "/"}
    for path in paths:
        if path in folders:
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
