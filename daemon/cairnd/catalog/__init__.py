"""What exists: an index of the manifests, rebuilt from them at start."""
