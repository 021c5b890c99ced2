"""Reading back: what exists in which tier, and bringing it near."""
