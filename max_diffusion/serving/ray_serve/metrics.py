"""Merges the metrics of all replicas in one text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families


@final
class ServiceMetrics:
    """Counts what a service does itself, and collects what its replicas do."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._replicas = Gauge(
            "max_diffusion_replicas",
            "Replicas that answer",
            registry=self._registry,
        )
        self.retried = Counter(
            "max_diffusion_retried_requests",
            "Requests given to a second replica, as the first was lost",
            registry=self._registry,
        )
        self.lost = Counter(
            "max_diffusion_lost_requests",
            "Requests that failed with their replica",
            registry=self._registry,
        )

    def text(self, replicas: Mapping[str, str]) -> bytes:
        """Returns the service's figures, and each replica's labelled ``replica``.

        Figures of a replica end with it; sums are left to who asks.

        Args:
            replicas: Prometheus's text by the replica's id.
        """
        self._replicas.set(len(replicas))
        return generate_latest(self._registry) + generate_latest(_Labelled(replicas))


@final
@dataclass(frozen=True)
class _Labelled:
    """Collects metric families of several texts, each family once."""

    texts: Mapping[str, str]

    def collect(self) -> Iterable[Metric]:
        """Returns all families, with the replica's id as a label of each sample."""
        families: dict[str, Metric] = {}
        for replica, text in self.texts.items():
            for family in text_string_to_metric_families(text):
                merged = families.setdefault(
                    family.name,
                    Metric(family.name, family.documentation, family.type),
                )
                for sample in family.samples:
                    labels = sample.labels | {"replica": replica}
                    merged.add_sample(sample.name, labels, sample.value)
        return families.values()
