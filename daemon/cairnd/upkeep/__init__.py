"""What keeps the tiers in order: recovery at start, retention, deletion."""
