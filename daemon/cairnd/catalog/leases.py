"""Claims that protect a version from deletion while a restore reads it. Held by a client, dropped when it is gone."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from cairn_api.errors import ConfigurationError
from cairn_api.names import VersionId
from cairnd.catalog.catalog import Catalog


@dataclass(slots=True, eq=False)
class Lease:
    """One restore's claim. ``partitions`` maps each fetched path to what serves it (set by the fetcher)."""

    name: str
    client: int
    job: str
    version: VersionId
    partitions: dict[str, object] = field(default_factory=dict)


class Leases:
    """All leases of this daemon, in memory: they end with the daemon, and so does every restore it serves."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._leases: dict[str, Lease] = {}

    def take(self, client: int, job: str, version: VersionId) -> Lease:
        """Protect a version for *client*."""
        lease = Lease(secrets.token_hex(16), client, job, version)
        self._leases[lease.name] = lease
        return lease

    def get(self, name: str, client: int) -> Lease:
        """The lease of that name, which must belong to *client*."""
        lease = self._leases.get(name)
        if lease is None or lease.client != client:
            raise ConfigurationError("this restore lease does not exist (any more)", hint="fetch the version again")
        return lease

    def holds(self, lease: Lease) -> bool:
        """Whether *lease* has not ended."""
        return self._leases.get(lease.name) is lease

    def end(self, lease: Lease) -> None:
        """Give up a lease; does nothing if it ended already."""
        if self._leases.pop(lease.name, None) is not None:
            self._catalog.wake()

    def of_client(self, client: int) -> list[Lease]:
        """What *client* holds."""
        return [lease for lease in self._leases.values() if lease.client == client]

    def protects(self, job: str, version: VersionId) -> bool:
        """Whether a restore reads this version."""
        return any((lease.job, lease.version) == (job, version) for lease in self._leases.values())

    async def wait_released(self, job: str, version: VersionId) -> None:
        """Wait until no restore reads this version (a restore ends at the latest when its process does)."""
        while not await self._catalog.wait_until(lambda: not self.protects(job, version), 3600.0):
            pass
