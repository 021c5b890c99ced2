"""Cairn as DeepSpeed's checkpoint engine, switched on by a ``"cairn"`` block in the DeepSpeed JSON.

Importing this package is the explicit form of what ``cairn_autoload`` does by itself in an installed environment; use
it where the autoload is switched off or torch is older than 2.5. Before or after ``import deepspeed``, once or often:
the result is the same, and nothing happens to a training whose JSON has no such block.

Tested with DeepSpeed 0.19.8.
"""

from __future__ import annotations

from cairn_autoload import watch

watch()
