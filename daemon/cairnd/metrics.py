"""The numbers an operator pages on, counted from the first day whether or not an endpoint is configured."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from cairn_api.errors import ConfigurationError

_STAGE_BUCKETS_S = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1200, 3600)


class Metrics:
    """All metrics of one daemon, in a registry of their own so that several daemons can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter, gauge = self._counter, self._gauge
        self.stage_seconds = Histogram(
            "cairn_stage_seconds", "Time of one unit of work per stage", ["stage"], registry=self.registry,
            buckets=_STAGE_BUCKETS_S,
        )  # fmt: skip
        self.stage_bytes = counter("cairn_stage_bytes", "Bytes that passed a stage", "stage")
        self.stage_failures = counter("cairn_stage_failures", "Units of work that failed per stage", "stage")
        self.saves = counter("cairn_saves", "Saves by how they ended: committed, aborted, skipped", "outcome")
        self.verify_failures = counter("cairn_verify_failures", "Copies whose bytes did not match their digest", "tier")
        self.lost_claims = counter("cairn_lost_claims", "Versions that lost their place in the queue to tier 2")
        self.store_requests = counter("cairn_store_requests", "Requests to object storage", "operation", "outcome")
        self.store_bytes = counter("cairn_store_bytes", "Bytes to and from object storage", "operation")
        self.store_seconds = counter("cairn_store_seconds", "Seconds spent in object storage", "operation")
        self.backlog_versions = gauge("cairn_backlog_versions", "Versions waiting for tier 2")
        self.backlog_bytes = gauge("cairn_backlog_bytes", "Bytes waiting for tier 2")
        self.oldest_unpersisted_age_s = gauge(
            "cairn_oldest_unpersisted_age_seconds", "Age of the oldest version waiting for tier 2; 0 if none waits"
        )
        self.last_persisted_sequence = gauge(
            "cairn_last_persisted_sequence", "Sequence of the newest version in tier 2", "job"
        )
        self.last_persisted_time_s = gauge(
            "cairn_last_persisted_time_seconds", "Wall-clock time at which a version last reached tier 2", "job"
        )
        self.memory_granted_bytes = gauge("cairn_memory_granted_bytes", "Capture memory granted to ranks")
        self.memory_limit_bytes = gauge("cairn_memory_limit_bytes", "Capture memory that may be granted")
        self.tier1_used_bytes = gauge("cairn_tier1_used_bytes", "Bytes of versions in tier 1")
        self.tier1_free_bytes = gauge("cairn_tier1_free_bytes", "Free bytes of tier 1's file system")
        self.clients = gauge("cairn_clients", "Connected clients")
        self.tier2_reachable = gauge("cairn_tier2_reachable", "1 if the last request to tier 2 was answered")
        self.start_time_s = gauge("cairn_start_time_seconds", "Wall-clock time at which this daemon started")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def serve(self, address: str) -> Callable[[], None]:
        """Serve ``/metrics`` at *address* (``host:port``); returns what stops it."""
        host, _, port = address.rpartition(":")
        try:
            server, thread = start_http_server(int(port), addr=host or "127.0.0.1", registry=self.registry)
        except (ValueError, OSError) as error:
            raise ConfigurationError(
                f"cannot serve metrics at {address!r}: {error}", hint="set metrics_address to a free host:port"
            ) from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop


class StoreMetrics:
    """Feeds what :class:`cairnd.tiers.metered.MeteredStore` measures into :class:`Metrics`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def record(self, operation: str, *, size_bytes: int, duration_s: float, failure: str) -> None:
        """One operation of an object store ended; *failure* is an error class's name or empty."""
        self._metrics.store_requests.labels(operation, failure or "ok").inc()
        self._metrics.store_bytes.labels(operation).inc(size_bytes)
        self._metrics.store_seconds.labels(operation).inc(duration_s)


def value_of(metric: Counter | Gauge) -> float:
    """The present value of a metric, summed over its labels: ``cairn status`` shows what Prometheus scrapes."""
    return sum(
        sample.value for family in metric.collect() for sample in family.samples if not sample.name.endswith("_created")
    )
