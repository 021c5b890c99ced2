"""A trainer that becomes another user: ``python -m tests.e2e.as_user UID RUNTIME_DIR``; tells as JSON what it met.

Everything is imported before the user changes, because an interpreter below root's home cannot be read afterwards.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch

import cairn
import cairn.capture.globals
import cairn.capture.plan
import cairn.client
from cairn.integrations.deepspeed.save_dir import SaveDir, Tier1
from cairn_api.names import VersionId


def main() -> None:
    user, runtime_dir = int(sys.argv[1]), sys.argv[2]
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    told: dict[str, object] = {"uid": os.getuid()}
    try:
        client = cairn.connect(job="shared-node", runtime_dir=runtime_dir)
        with client.create("step1") as checkpoint:
            checkpoint.save("model.pt", {"weight": torch.arange(100_000)})
        version = client.wait("step1", durability="tier2", timeout=60)
        told["loaded"] = bool(torch.equal(client.load("step1", "model.pt")["weight"], torch.arange(100_000)))
        published = Path(client.daemon.tier1_path) / "jobs" / "shared-node" / str(version) / "model.pt"
        told["read_by_name"] = bool(torch.equal(torch.load(published)["weight"], torch.arange(100_000)))
        try:
            published.write_bytes(b"overwritten")
            told["overwrite"] = "succeeded"
        except PermissionError:
            told["overwrite"] = "refused"
        told["save_dir"] = linked(client, version)
        client.close()
    except cairn.CairnError as error:
        told["error"], told["hint"] = error.message, error.hint
    print(json.dumps(told))


def linked(client: cairn.Client, version: VersionId) -> str:
    """What a ``save_dir`` of this user shows of the version once it is settled."""
    with tempfile.TemporaryDirectory() as folder:
        tier1 = Tier1(client.daemon.tier1_path, "shared-node")
        save_dir = SaveDir(folder, "shared-node", tier1, "auto", 0, ("node",))
        save_dir.show_saved(version, [["model.pt"]])
        if not save_dir.settle(version.tag, version):
            return "not settled"
        shown = save_dir.folder(version.tag) / "model.pt"
        return "link" if shown.is_symlink() and torch.load(shown)["weight"].numel() == 100_000 else "no link"


if __name__ == "__main__":
    main()
