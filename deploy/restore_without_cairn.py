#!/usr/bin/env python3
"""Restore and verify one version with Cairn uninstalled: from a bucket (any fsspec URL) or from a tier 1 folder.

    python restore_without_cairn.py s3://bucket/prefix/JOB/VERSION  DIRECTORY
    python restore_without_cairn.py /var/lib/cairn/jobs/JOB/VERSION  DIRECTORY

Needs fsspec (and s3fs for s3://). Checks the manifest, then every byte against its CRC-64/NVME.
"""

import contextlib
import json
import os
import sys

import fsspec

POLYNOMIAL = 0x9A6C9329AC4BC9B5  # CRC-64/NVME, reflected
TABLE = []
for byte in range(256):
    for _ in range(8):
        byte = byte >> 1 ^ (POLYNOMIAL if byte & 1 else 0)  # noqa: PLW2901 - the usual way to fill the table
    TABLE.append(byte)


def crc64nvme(data, crc=0):
    crc ^= 0xFFFFFFFFFFFFFFFF
    for value in data:
        crc = TABLE[(crc ^ value) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFFFFFFFFFF


with contextlib.suppress(ImportError):  # a thousand times faster, and the same numbers
    from awscrt.checksums import crc64nvme


def document(data):
    parsed = json.loads(data)
    stated = parsed.pop("crc64nvme")
    canonical = json.dumps(parsed, sort_keys=True, separators=(",", ":"))
    check(stated == f"{crc64nvme(canonical.encode()):016x}", "a manifest is damaged")
    return parsed


def check(sound, problem):  # not assert: python -O would skip it
    if not sound:
        sys.exit(f"restore_without_cairn: {problem}")


check(len(sys.argv) == 3, f"two arguments are needed{__doc__.partition('.')[2]}")
source, target = sys.argv[1].rstrip("/"), sys.argv[2]
fs, root = fsspec.url_to_fs(source)
job_root, version = root.rsplit("/", 1)
in_bucket = fs.isdir(f"{root}/.cairn/nodes")
if in_bucket:  # a version of a bucket exists only through its decision key
    decision = f"{job_root}/.cairn/decisions/{version}.json"
    check(fs.exists(decision), f"{decision} is missing: copy the job's .cairn folder too, it says what is committed")
    check(document(fs.cat(decision))["verdict"] == "committed", f"{version} is not committed")
check(in_bucket or fs.exists(f"{root}/.cairn/manifest.json"), f"{source} is not the folder of a version")
names = fs.glob(f"{root}/.cairn/nodes/*.json") if in_bucket else [f"{root}/.cairn/manifest.json"]
manifests = [document(fs.cat(name)) for name in names]
ranks = {rank for manifest in manifests for rank in manifest["ranks"]}
check(ranks == set(range(manifests[0]["world_size"])), f"only ranks {sorted(ranks)} are here")
for partition in (item for manifest in manifests for item in manifest["partitions"]):
    check(".." not in partition["path"].split("/") and partition["path"][0] != "/", "a manifest names a path outside")
    path, crc, size = os.path.join(target, partition["path"]), 0, 0
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with fs.open(f"{root}/{partition['path']}", "rb") as reader, open(f"{path}.partial", "wb") as writer:
        while block := reader.read(1 << 24):
            crc, size = crc64nvme(block, crc), size + writer.write(block)
    same = (f"{crc:016x}", size) == (partition["crc64nvme"], partition["size_bytes"])
    check(same, f"{root}/{partition['path']} is damaged")
    os.replace(f"{path}.partial", path)
    print(f"{size:>15,}  {partition['path']}")
