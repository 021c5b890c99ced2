"""Where bytes lie: tier 1 (a local folder) and tier 2 (an object store).

Everything below this package knows keys and bytes only: no versions, no manifests. Keys are names joined by ``/``,
relative to a root. All calls block; the daemon makes them from a thread pool.
"""
