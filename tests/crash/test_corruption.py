"""Whatever happens to the bytes at rest: it is noticed, and no restore gives anything but what was saved."""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

import cairn
from cairn_api.errors import VersionError
from cairnd import layout
from cairnd.digests import BLOCK_BYTES
from cairnd.model import Tier, Version, VersionState
from cairnd.replication.bucket import BucketRepository
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.tiers.local import LocalTier
from cairnd.tiers.stores.file import FileStore
from cairnd.upkeep import verifier
from tests.crash import media, ranks
from tests.crash.corruption import Figures, Rounds, command
from tests.crash.damaged_records import RecordRounds
from tests.crash.disks import LoopDisk, need_disks
from tests.crash.live_damage import LiveRounds
from tests.crash.served import CaptureBuffers, Served, state_of
from tests.crash.small_world import FEW, World
from tests.crash.trainer import same
from tests.daemon.lab import JOB, Lab, Rank, eventually
from tests.daemon_process import DaemonProcess
from tests.promises import Evidence, proof_size

AT_REST = proof_size(1000, 7700)
RECORDS = proof_size(60, 400)
LIVE = proof_size(300, 1500)
SERVED = proof_size(60, 400)
LARGE_BLOCKS = proof_size(6, 40)
IN_CAPTURE_MEMORY = proof_size(6, 40)
MOST_FAULTS_TO_CATCH = 100

SEED = int(os.environ.get("CAIRN_CRASH_SEED") or secrets.randbelow(10**6))
"""Printed with the figures; set it to draw the same faults again."""

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of the test's own is made in it
_GRACE_S = 10.0

Print = Callable[[str], None]


@pytest.fixture
def quick(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Path]:
    """A folder in memory where there is one: damage is the same on any medium, and syncs take most of a round.

    What daemons in this process log about every fault is not kept: it would come to hundreds of megabytes.
    """
    caplog.set_level(logging.CRITICAL, logger="cairnd")
    if not os.access(_SHARED_MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=_SHARED_MEMORY, prefix="cairn-test-") as folder:
        yield Path(folder)


def told(found: Figures, what: str, evidence: Evidence, figures: Print, more: str = "") -> None:
    """Report *found*, and fail if anything in it is not as it must be."""
    figures(found.line(what) + more)
    evidence(tried=found.faults, broken=found.broken, detail=f"{found.faults:,} {what}")
    assert not found.problems, "\n".join(found.problems[:5])


@pytest.mark.promise("corruption")
@pytest.mark.timeout(120 + AT_REST // 4)
async def test_damage_at_rest(quick: Path, evidence: Evidence, figures: Print) -> None:
    rounds = Rounds(await World.build(quick / "node", Random(SEED)), SEED)  # noqa: S311 - bytes to save, no secrets
    found = await rounds.run(AT_REST)
    told(found, "in files of both tiers", evidence, figures)
    assert found.equal > AT_REST // 10, "so few restores prove nothing"
    assert found.refused > AT_REST // 10, "so few refusals prove nothing"


@pytest.mark.promise("corruption")
@pytest.mark.timeout(120 + 2 * RECORDS)
async def test_damaged_records_are_noticed_and_hide_no_version(quick: Path, evidence: Evidence, figures: Print) -> None:
    world = await World.build(quick / "node", Random(SEED), FEW)  # noqa: S311 - bytes to save, no secrets
    rounds = RecordRounds(world, SEED)
    found = await rounds.run(RECORDS)
    apart = "".join(f"\n  {count} not counted: {why}" for why, count in sorted(rounds.apart.items()))
    told(
        found,
        f"in job records, epoch claims, layout ({rounds.apart.total()} more could not be told from sound ones)",
        evidence,
        figures,
        apart,
    )


@pytest.mark.promise("corruption")
@pytest.mark.timeout(120 + LIVE // 5)
async def test_damage_under_a_running_daemon(quick: Path, evidence: Evidence, figures: Print) -> None:
    found = await LiveRounds(quick / "node", SEED).run(LIVE)
    told(found, "under a running daemon with `verify_on_load = always`", evidence, figures)


@pytest.mark.promise("corruption")
@pytest.mark.timeout(120 + 2 * SERVED)
def test_what_a_client_restores(quick: Path, evidence: Evidence, figures: Print) -> None:
    found = Served(quick / "node", SEED).run(SERVED)
    told(found, "judged by what a client restored", evidence, figures)
    assert found.equal > SERVED // 10, "so few restores prove nothing"


@pytest.mark.planted("no_digest_at_restore")
@pytest.mark.timeout(180)
def test_a_restore_that_skips_the_digests_is_caught(quick: Path, figures: Print) -> None:
    found = Served(quick / "node", SEED, fault="no_digest_at_restore").run(MOST_FAULTS_TO_CATCH, stop_at_first=True)
    figures(found.line("with no_digest_at_restore planted"))
    assert found.wrong, f"{found.faults} faults did not show the planted bug"


@pytest.mark.promise("corruption")
@pytest.mark.timeout(120 + 10 * LARGE_BLOCKS)
async def test_blocks_of_a_digest_that_change_places(quick: Path, evidence: Evidence, figures: Print) -> None:
    """A partition of more than one 16 MiB block: what is damaged is found in whichever block it is."""
    random = Random(SEED)  # noqa: S311 - choices of faults, not secrets
    data = random.randbytes(2 * BLOCK_BYTES + 1_000_000)
    lab = await Lab(quick / "node", capture_memory_bytes=4 * len(data)).start()
    (rank,) = await Rank.launch(lab)
    version = await rank.save({"model.pt": data}, persist=True)
    await lab.reaches(version, Tier.TIER2)
    fs, missed = OsFileSystem(), []
    tier1, bucket = LocalTier(fs, lab.tier1), BucketRepository(FileStore(fs, lab.bucket_path), lab.app.node)
    entry = Version(JOB, version, VersionState.COMMITTED, 1, "")
    for number in range(LARGE_BLOCKS):
        tier = (Tier.TIER1, Tier.TIER2)[number % 2]
        path = lab.file(version, "model.pt") if tier is Tier.TIER1 else lab.object(version, "model.pt")
        changed = _change_large(random, data)
        media.overwrite(path, changed)
        await lab.restart(run=False)
        await lab.app.inventory.refresh(JOB)
        if tier is Tier.TIER1:
            findings = list(verifier.check_tier1(tier1, entry, deep=True, progress=lambda _: None))
        else:
            findings = list(verifier.check_tier2(bucket, entry, deep=True, progress=lambda _: None))
        steps = [step async for step in lab.app.fetcher.fetch(1, lab.version(version), ())]
        if not findings or lab.file(version, "model.pt").read_bytes() != data:
            missed.append(f"{tier}, number {number} of seed {SEED}: {findings}, {steps[-1].ready}")
        media.overwrite(path, data)
        shutil.rmtree(lab.tier1 / layout.QUARANTINE, ignore_errors=True)
    await lab.close()
    evidence(tried=LARGE_BLOCKS, broken=len(missed), detail=f"{LARGE_BLOCKS} in a partition of three 16 MiB blocks")
    figures(f"a partition of three blocks: {LARGE_BLOCKS} faults, {len(missed)} unnoticed or wrong (seed {SEED})")
    assert not missed


def _change_large(random: Random, data: bytes) -> bytes:
    if random.random() < 0.5:
        return media.swap_blocks(random, data, BLOCK_BYTES)
    at = random.choice((0, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES, len(data) - 1, random.randrange(len(data))))
    return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]


@pytest.mark.root
@pytest.mark.promise("corruption")
async def test_what_rots_below_a_warm_page_cache(tmp_path: Path, evidence: Evidence) -> None:
    """`cairn verify --deep` reads the disk: reads through the page cache go on giving what was once written."""
    need_disks("ext4")
    rng = Random(SEED)  # noqa: S311 - contents, not secrets
    with LoopDisk(tmp_path, "ext4", 256 << 20) as disk:
        lab = await Lab(disk.path / "node", capture_memory_bytes=64 << 20).start()
        (rank,) = await Rank.launch(lab)
        data = rng.randbytes(3_000_000)
        version = await rank.save({"model.pt": data})
        await lab.reaches(version, Tier.TIER1)
        path, tier1 = lab.file(version, "model.pt"), LocalTier(OsFileSystem(), lab.tier1)
        assert path.read_bytes() == data  # and now the page cache has it
        with disk.image.open("r+b") as image, mmap.mmap(image.fileno(), 0) as sectors:
            at = sectors.find(data[1 << 20 : (1 << 20) + 4096])
            assert at >= 0, "the page is not on the disk as it was written"
            sectors[at] ^= 1
        assert path.read_bytes() == data, "the control: the page cache shows nothing of it"
        entry = lab.version(version)
        findings = list(verifier.check_tier1(tier1, entry, deep=True, progress=lambda _: None))
        (step,) = [step async for step in lab.app.verification.verify([entry], deep=True)][:1]
        damaged = entry.copy(Tier.TIER1).damaged
        await lab.close()
    evidence(tried=1, broken=not (findings and step.findings and damaged), detail="1 below a warm page cache")
    assert [finding.path for finding in findings] == ["model.pt"]
    assert damaged


@pytest.mark.root
@pytest.mark.promise("corruption")
@pytest.mark.timeout(120 + IN_CAPTURE_MEMORY)
def test_capture_memory_of_a_real_daemon(quick: Path, evidence: Evidence, figures: Print) -> None:
    """Capture memory is sealed against everybody but the daemon, so it is damaged as failing memory would be."""
    if os.geteuid() != 0:
        pytest.skip("NOT PROVED HERE: writing into the daemon's memory needs root; run as root")
    random, wrong, name = Random(SEED), [], "model.pt"  # noqa: S311 - choices of faults, not secrets
    with DaemonProcess(quick / "node") as daemon, cairn.connect(job=JOB, runtime_dir=str(daemon.runtime_dir)) as client:
        for number in range(IN_CAPTURE_MEMORY):
            tag = f"step{number}"
            with client.create(tag) as checkpoint:
                checkpoint.save(name, state_of(tag, name))
            version = client.wait(tag, "tier1", 30)
            path = daemon.tier1_path / layout.partition(JOB, version, name)
            data = path.read_bytes()
            (address,) = CaptureBuffers(daemon.pid).holding(data)
            CaptureBuffers(daemon.pid).write(address, media.flip_bit(random, data))
            with client.restore(tag) or pytest.fail("nothing to restore") as restored:
                if restored.from_tier == "memory" or not same(restored.load(name), state_of(tag, name)):
                    wrong.append(f"{tag} from {restored.from_tier}")
        counted = ranks.status(daemon).verify_failures
    figures(f"capture memory of a real daemon: {IN_CAPTURE_MEMORY} bits flipped, {len(wrong)} wrong (seed {SEED})")
    evidence(tried=IN_CAPTURE_MEMORY, broken=len(wrong), detail=f"{IN_CAPTURE_MEMORY} in a daemon's memory")
    assert not wrong
    assert counted == IN_CAPTURE_MEMORY


@pytest.mark.parametrize("record", ["tier 1 manifest", "node manifest", "decision key"])
def test_a_job_whose_only_version_is_unreadable_is_not_a_new_job(quick: Path, record: str) -> None:
    """A training that is told "there is nothing" begins from nothing. That answer must be certain."""
    in_bucket = record != "tier 1 manifest"
    storage = None if in_bucket else ""
    with DaemonProcess(quick / "node", persistent_storage_path=storage) as daemon:
        with cairn.connect(job=JOB, runtime_dir=str(daemon.runtime_dir)) as client:
            with client.create("step1") as checkpoint:
                checkpoint.save("model.pt", state_of("step1", "model.pt"))
            client.wait("step1", "tier2" if in_bucket else "tier1", 30)
        daemon.kill9()
        if in_bucket:
            media.reset(daemon.tier1_path, {})  # another machine
            (path,) = daemon.bucket_path.rglob("nodes/*.json" if record == "node manifest" else "decisions/*.json")
        else:
            (path,) = daemon.tier1_path.rglob("manifest.json")
        media.overwrite(path, media.flip_bit(Random(SEED), path.read_bytes()))  # noqa: S311 - not a secret
        for _ in range(2):  # also after another start
            daemon.start()
            with cairn.connect(job=JOB, runtime_dir=str(daemon.runtime_dir)) as client:
                with pytest.raises(VersionError, match="step1: no copy can be read"):
                    client.restore()
                if in_bucket:
                    with pytest.raises(VersionError, match="step1: no copy can be read"):
                        client.restore(source=f"file://{daemon.bucket_path}")
            daemon.kill9()


async def test_a_decision_that_went_astray_deletes_nothing(quick: Path) -> None:
    """One version's "deleted" over another's "committed": whoever believes it takes the data of a version in use."""
    lab = await Lab(quick / "node", tier2_delete_grace_s=_GRACE_S).start()
    (rank,) = await Rank.launch(lab)
    old, new = await rank.save(persist=True), await rank.save(persist=True)
    for version in (old, new):
        await lab.reaches(version, Tier.TIER2)
    plan = lab.app.keeper.plan_version(lab.version(old))
    await lab.app.keeper.delete([deletion for deletion in plan if deletion.tier is Tier.TIER2])
    deleted = lab.bucket_path / layout.Bucket.decision(JOB, old)
    media.overwrite(lab.bucket_path / layout.Bucket.decision(JOB, new), deleted.read_bytes())
    await lab.restart()
    await eventually(lambda: lab.version(new).copy(Tier.TIER2).damaged)
    await lab.passes(lambda: not lab.object(old, "model.pt").exists())
    assert lab.object(new, "model.pt").exists()
    assert lab.version(new).has(Tier.TIER1)
    await lab.close()


def test_a_file_that_the_daemon_believes_is_read_by_verify(quick: Path) -> None:
    """``verify_on_load = cached`` trusts what the daemon wrote: the next look by ``verify --deep`` ends that."""
    with DaemonProcess(quick / "node", verify_on_load="cached") as daemon:
        runtime_dir = str(daemon.runtime_dir)
        with cairn.connect(job=JOB, runtime_dir=runtime_dir, buffers=1) as client:
            for tag in ("step1", "step2"):  # the second one takes the buffer of the first
                with client.create(tag) as checkpoint:
                    checkpoint.save("model.pt", state_of(tag, "model.pt"))
                client.wait(tag, "tier2", 30)
        (path,) = daemon.tier1_path.rglob("*-step1/model.pt")
        media.overwrite(path, media.flip_bit(Random(SEED), path.read_bytes()))  # noqa: S311 - not a secret
        status, said = command("--json", "--runtime-dir", runtime_dir, "--job", JOB, "verify", "--deep")
        assert (status, "does not match its digest" in said) == (1, True), said
        with (
            cairn.connect(job=JOB, runtime_dir=runtime_dir) as client,
            client.restore("step1") or pytest.fail("nothing to restore") as restored,
        ):
            assert restored.from_tier != "memory"
            assert same(restored.load("model.pt"), state_of("step1", "model.pt"))
