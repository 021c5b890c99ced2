"""Names of jobs, tags, partitions and versions, and links planted where folders belong: nothing leaves the root."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cairn_api.errors import CairnError
from cairn_api.names import VersionId, check_partition, parse_version, stored_path
from cairnd import layout
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.tiers.stores.file import FileStore
from tests.hostile.seeds import SEED, choices
from tests.hostile.wire_inputs import HOSTILE_TEXTS
from tests.promises import Evidence, proof_size

pytestmark = pytest.mark.fault

NAMES = proof_size(500, 10_000)

_PIECES = (
    "..", ".", "/", "//", "\\", "\0", "\n", " ", "a", "x.pt", "%2e%2e", "..;", "\u2025", "\uff0f", "\u2044", "~", "-",
    ".cairn", "by-rank", "canary", "$HOME", "*", ":", "\udc2e", "C:", "\u202e", "e00001-s000001-t", "jobs",
)  # fmt: skip
_LINKED = (
    "jobs", "jobs/job", "jobs/job/e00001-s000001-t", "jobs/job/e00001-s000001-t/p", "jobs/job/e00001-s000001-t/.cairn",
    ".cairn", ".cairn/jobs", ".cairn/jobs/job.json", "job", "job/e00001-s000001-t", "job/e00001-s000001-t/p",
)  # fmt: skip
_VERSION = VersionId(1, 1, "t")


def hostile_names(chance: random.Random, folder: Path) -> Iterator[str]:
    """Names that try to get out, to *folder* for example, for ever."""
    up = "../" * 12
    while True:
        yield "".join(chance.choice(_PIECES) for _ in range(chance.randrange(1, 8)))
        yield chance.choice(HOSTILE_TEXTS)
        yield (
            chance.choice(("", "a/", "./", "/", "//")) + up[: 3 * chance.randrange(1, 12)] + str(folder / "canary")[1:]
        )
        yield f"{chance.choice(_PIECES)}/{chance.choice(_PIECES)}/{chance.choice(_PIECES)}"


def seen(folder: Path) -> dict[str, bytes | str]:
    """Everything below *folder*, with what is in it."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
    return found


def names_in(folder: Path) -> set[str]:
    """What lies in *folder*."""
    return {path.name for path in folder.iterdir()}


def uses(tier: LocalTier, store: FileStore, name: str) -> list[Callable[[], object]]:
    """All ways in which a name becomes a path: by the layout, and straight into a key."""
    keys: list[Callable[[], str]] = [
        lambda: name,
        lambda: layout.job_record(name),
        lambda: layout.partition("job", _VERSION, name),
        lambda: layout.partition(name, _VERSION, "p"),
        lambda: layout.partition("job", parse_version(name), "p"),
        lambda: layout.partition("job", VersionId(1, 1, name), check_partition("p")),
        lambda: layout.partition("job", _VERSION, stored_path(name, 3, shared_name=True)),
        lambda: layout.pin(name, _VERSION),
        lambda: layout.health(name, _VERSION),
        lambda: layout.fetched("s3://x", "job", _VERSION, name),
        lambda: layout.Bucket.partition("job", _VERSION, name),
        lambda: layout.Bucket.decision(name, _VERSION),
        lambda: layout.Bucket.node("job", _VERSION, name),
    ]

    def use(make: Callable[[], str], act: Callable[[str], object]) -> Callable[[], object]:
        return lambda: act(make())

    acts: list[Callable[[str], object]] = [
        lambda key: tier.put_small(key, b"hostile"),
        tier.read_small,
        tier.delete,
        tier.delete_tree,
        lambda key: tier.begin(key, f"{key}.tmp", 10).discard(),
        lambda key: store.put(key, b"hostile"),
        lambda key: store.put_if_absent(key, b"hostile"),
        lambda key: store.get(key, 1000),
        store.delete,
        lambda key: list(store.list(f"{key}/")),
    ]
    return [use(make, act) for make in keys for act in acts]


@pytest.fixture
def outside(place: Path) -> Path:
    """A folder beside the roots, with a file that nobody may touch."""
    folder = place / "outside"
    folder.mkdir()
    (folder / "canary").write_bytes(b"untouched")
    (folder / "sub").mkdir()
    (folder / "sub" / "canary").write_bytes(b"untouched")
    return folder


@pytest.mark.promise("bad_input")
@pytest.mark.timeout(120 + NAMES // 10)
def test_no_name_leaves_its_root(place: Path, outside: Path, evidence: Evidence) -> None:
    chance = choices()
    roots = place / "roots"
    (roots / "tier1").mkdir(parents=True)
    tier = LocalTier(OsFileSystem(), roots / "tier1")
    store = FileStore(OsFileSystem(), roots / "bucket")
    before = seen(outside)
    names = hostile_names(chance, outside)
    wrong = []
    for _ in range(NAMES):
        name = next(names)
        for use in chance.sample(uses(tier, store, name), 8):
            try:
                use()
            except CairnError:
                continue
            except Exception as error:  # noqa: BLE001 - the finding itself
                wrong.append(f"{name!r}: {type(error).__name__}: {error}")
    if seen(outside) != before or names_in(place) != {"roots", "outside"}:
        wrong.append("something outside was changed")
    if names_in(roots) - {"tier1", "bucket"}:
        wrong.append(f"made beside the roots: {names_in(roots)}")
    evidence(tried=NAMES, broken=len(wrong))
    assert not wrong, f"CAIRN_CRASH_SEED={SEED}: {wrong[:10]}"


def test_planted_links_are_not_followed(place: Path, outside: Path) -> None:
    """Whoever can write into a root (an older release's mistake, a restored backup) cannot point Cairn elsewhere."""
    roots = place / "roots"
    for key in _LINKED:
        for target in (outside, outside / "canary", Path("/dev/zero")):
            for kind in ("tier1", "bucket"):
                root = roots / kind
                link = root / key
                link.parent.mkdir(parents=True)
                link.symlink_to(target)
                tier, store = LocalTier(OsFileSystem(), root), FileStore(OsFileSystem(), root)
                before = seen(outside)
                for use in uses(tier, store, "p") + uses(tier, store, "job"):
                    with suppress(CairnError):
                        use()
                    if not link.is_symlink():
                        break  # it was removed, not followed
                assert seen(outside) == before, f"{kind}: {key} -> {target} was followed"
                _remove(roots)


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
    folder.rmdir()
