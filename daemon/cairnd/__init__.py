"""The Cairn daemon: takes checkpoints from the ranks of one node and keeps them safe. Never imports torch."""

__version__ = "0.1.0"
