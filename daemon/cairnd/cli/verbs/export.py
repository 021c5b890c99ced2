"""Write a version as a plain checkpoint folder, with every digest checked on the way.

DIR gets the files under the names that they were saved under (by-rank/<rank>/... where two ranks used one name), and
nothing of Cairn's: torch.load and zero_to_fp32.py need nothing else. With --tag-folder they lie in DIR/<tag> and
DIR/latest names the tag, which is what DeepSpeed's load_checkpoint(DIR) expects. The folder appears whole or not at
all. A folder with something in it is refused; with --force it is moved aside, never merged with and never deleted.

JSON: {"job", "tag", "epoch", "sequence", "version", "directory", "moved_aside": path or null, "size_bytes",
"files": [{"path", "size_bytes", "crc64nvme": 16 hex digits, "sha256": hex digits or null}, ...]}; paths are relative
to "directory".
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from cairnd.cli.documents import name_document
from cairnd.cli.exporting import Exported, Target, export
from cairnd.cli.invocation import Invocation
from cairnd.cli.text import count_text, size_text

NAME = "export"
HELP = "write a version as a plain checkpoint folder"


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("version", metavar="VERSION", help="a version's name, or a tag")
    parser.add_argument("directory", metavar="DIR", type=Path, help="the folder to write")
    parser.add_argument("--force", action="store_true", help="if DIR holds something, move it aside")
    parser.add_argument("--sums", action="store_true", help="add SHA256SUMS, for sha256sum --check")
    parser.add_argument("--tag-folder", action="store_true", help="write DIR/<tag> and DIR/latest, as DeepSpeed does")


def run(invocation: Invocation) -> int:
    arguments, output = invocation.arguments, invocation.output
    job = invocation.job()
    source = invocation.source()
    version = source.describe(job, invocation.version(job, arguments.version))
    target = Target.choose(
        arguments.directory.absolute(), version.id.tag, tag_folder=arguments.tag_folder, force=arguments.force
    )
    with output.progress("fetching") as advance, source.reading(version, advance) as blocks:
        # Fetching may have settled what was still being written: digests and sizes are final only now.
        version = source.describe(job, str(version.id))
        with output.progress("exporting") as advance_export:
            done = export(version, blocks, target, sums=arguments.sums, progress=advance_export)
    if output.as_json:
        output.json(_document(job, done))
        return 0
    if done.moved_aside is not None:
        output.warn(f"what was in {done.folder} is now {done.moved_aside}")
    size = size_text(sum(item.size_bytes for item in done.files))
    output.text(f"{done.version} is in {done.folder}: {count_text(len(done.files), 'file')}, {size}, digests checked.")
    return 0


def _document(job: str, done: Exported) -> dict[str, object]:
    return {
        **name_document(job, done.version),
        "directory": str(done.folder),
        "moved_aside": str(done.moved_aside) if done.moved_aside is not None else None,
        "size_bytes": sum(item.size_bytes for item in done.files),
        "files": [
            {"path": item.path, "size_bytes": item.size_bytes, "crc64nvme": item.crc64nvme, "sha256": item.sha256}
            for item in done.files
        ],
    }
