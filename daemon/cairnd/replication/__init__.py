"""Tier 2: what the bucket holds, how a version gets there, how it becomes visible."""
