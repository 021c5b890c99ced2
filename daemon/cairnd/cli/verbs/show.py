"""Show one version: what it is, where its copies are, its partitions.

VERSION is a full name, e00007-s000042, or a tag (its newest version). Partitions are plain torch.save files. Python
globals that their pickles name beyond those of plain tensors and containers are listed: whoever loads them with
weights_only=False trusts whoever saved them.

JSON: {"version": VERSION} with VERSION as in `cairn list` and also "nonce", "reason", "file_marks": bool,
"attributes": {name: text}, "partitions": [{"name", "path", "rank", "size_bytes", "crc64nvme": 16 hex digits or null,
"globals": [name, ...]}, ...] and "unusual_globals": [name, ...].
"""

from __future__ import annotations

from argparse import ArgumentParser

from cairnd.cli.documents import Document, version_document
from cairnd.cli.invocation import Invocation
from cairnd.cli.text import Column, age_text, clean, count_text, size_text, table, time_text, wrapped
from cairnd.model import Partition, Version

NAME = "show"
HELP = "show one version with its copies and partitions"

_COLUMNS = (
    Column("PARTITION", shrinks=True, minimum=16),
    Column("RANK", right=True),
    Column("SIZE", right=True),
    Column("CRC-64/NVME"),
)
_USUAL = frozenset(
    {
        "_codecs.encode", "builtins.bytearray", "builtins.complex", "builtins.set", "collections.Counter",
        "collections.OrderedDict", "torch.Size", "torch.Tensor", "torch.device", "torch.nn.parameter.Parameter",
        "torch._tensor._rebuild_from_type_v2", "torch.serialization._get_layout", "torch.storage.TypedStorage",
        "torch.storage.UntypedStorage",
    }
)  # fmt: skip
"""With what :func:`is_usual` adds: names that torch.load(weights_only=True) of torch 2.13 allows by itself."""
_DTYPES = (
    "bfloat", "bits", "bool", "complex", "float", "int", "per_channel_", "per_tensor_", "qint", "quint", "uint",
)  # fmt: skip


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("version", metavar="VERSION", help="a version's name, or a tag")


def run(invocation: Invocation) -> int:
    job = invocation.job()
    version = invocation.source().describe(job, invocation.version(job, invocation.arguments.version))
    if invocation.output.as_json:
        invocation.output.json({"version": document(version)})
    else:
        invocation.output.lines(render(version, invocation.now_s))
    return 0


def document(version: Version) -> Document:
    """See the module."""
    return {
        **version_document(version, version.size_bytes),
        "nonce": version.nonce,
        "reason": version.reason,
        "file_marks": version.file_marks,
        "attributes": dict(version.attributes),
        "partitions": [
            {
                "name": item.name,
                "path": item.path,
                "rank": item.rank,
                "size_bytes": item.size_bytes,
                "crc64nvme": _crc(item) or None,
                "globals": list(item.globals),
            }
            for item in version.partitions
        ],
        "unusual_globals": unusual_globals(version),
    }


def render(version: Version, now_s: float) -> list[str]:
    """See the module."""
    age = f" ({age_text(now_s - version.created_s)} ago)" if version.created_s else ""
    size = f"{size_text(version.size_bytes)} in {count_text(len(version.partitions), 'partition')}"
    facts = {
        "version": str(version.id),
        "job": version.job,
        "state": f"{version.state.value}: {version.reason}" if version.reason else version.state.value,
        "created": time_text(version.created_s) + age,
        "size": size,
        "ranks": f"{len(version.ranks)} of {version.world_size} are known here",
        "save_dir": version.save_dir,
        "launch": version.nonce,
        "persist": "yes" if version.wants_tier2 else "no",
        "pinned": "yes" if version.pinned else "no",
        **({"passed over": version.passed_over} if version.passed_over else {}),
        **dict(sorted(version.attributes.items())),
    }
    lines: list[str] = []
    for name, text in facts.items():
        lines += wrapped(text, first=f"{clean(name):<10} ", indent=" " * 11)
    for tier, copy in sorted(version.copies.items()):
        text = f"{copy.state.value}: {copy.error}" if copy.error else copy.state.value
        lines += wrapped(text, first=f"in {tier.value:<7} ", indent=" " * 11)
    rows = [(item.path, str(item.rank), size_text(item.size_bytes), _crc(item) or "-") for item in version.partitions]
    lines += ["", *table(_COLUMNS, rows)]
    unusual = unusual_globals(version)
    if unusual:
        lines += ["", "Python globals beyond plain tensors and containers:"]
        for name in unusual:
            lines += wrapped(name, first="  ", indent="    ")
    return lines


def unusual_globals(version: Version) -> list[str]:
    """Globals in the pickles that ``torch.load(weights_only=True)`` does not allow by itself, sorted."""
    return sorted({name for item in version.partitions for name in item.globals if not is_usual(name)})


def is_usual(name: str) -> bool:
    """Whether *name* (``module.qualname``) is allowed by ``torch.load(weights_only=True)`` without further ado."""
    if name in _USUAL or name.startswith("torch._utils._rebuild_"):
        return True
    module, _, last = name.rpartition(".")
    if module in ("torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse") and last.endswith(("Storage", "Tensor")):
        return True
    return module == "torch" and last.startswith(_DTYPES)


def _crc(partition: Partition) -> str:
    return f"{partition.digest.crc64nvme:016x}" if partition.digest is not None else ""
