"""One S3 server for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.seaweed import SeaweedServer, seaweed_server


@pytest.fixture(scope="session")
def seaweed() -> Iterator[SeaweedServer]:
    with seaweed_server() as server:
        yield server
