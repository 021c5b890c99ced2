"""Memory that messages of a stream took and gave back is not asked of the kernel again."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource
from cairnd.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        message = bytearray()
        for _ in range(32):
            message.extend(bytes(64 * 1024))
        bytes(message)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
faults()
print(faults())
"""


def test_messages_that_come_and_go_take_no_fresh_pages() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 100, "left to itself the allocator asks for thousands"
