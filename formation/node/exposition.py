"""Prometheus' text format 0.0.4, written by hand: it is a page of specification.

prometheus-client was considered: it keeps values in global registries behind thread locks, so that each counter of ours would
be counted twice, and its own collectors and HTTP server are not for trio. Here values are read from the services when they
are asked for, and nothing else is kept.
Source: prometheus.io, "Exposition formats", "Metric and label naming".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from formation.core.histogram import Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
_HELP_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n"})


@dataclass(frozen=True, slots=True)
class Family:
    """What is measured: one name, one meaning."""

    name: str
    kind: str
    """counter, gauge or histogram."""
    help: str
    labels: tuple[str, ...] = ()


@dataclass(slots=True)
class Page:
    """Values of one moment."""

    _values: dict[str, list[tuple[tuple[str, ...], float | Histogram]]] = field(default_factory=dict)

    def put(self, family: Family, value: float | Histogram, *labels: str) -> None:
        """Set the value of a family, or of one of its label values."""
        assert len(labels) == len(family.labels), family.name
        assert isinstance(value, Histogram) == (family.kind == "histogram"), family.name
        self._values.setdefault(family.name, []).append((labels, value))

    def put_all(self, family: Family, values: Mapping[str, float]) -> None:
        """Set the values of a family with one label."""
        for label, value in values.items():
            self.put(family, value, label)

    def text(self, families: Iterable[Family]) -> str:
        """All of it; families without a value are left out."""
        lines: list[str] = []
        for family in families:
            values = self._values.get(family.name)
            if not values:
                continue
            lines.append(f"# HELP {family.name} {family.help.translate(_HELP_ESCAPES)}")
            lines.append(f"# TYPE {family.name} {family.kind}")
            for labels, value in values:
                lines += _samples(family, labels, value)
        return "\n".join(lines) + "\n"


def _samples(family: Family, labels: tuple[str, ...], value: float | Histogram) -> list[str]:
    pairs = list(zip(family.labels, labels, strict=True))
    if not isinstance(value, Histogram):
        return [f"{family.name}{_label_text(pairs)} {_number(value)}"]
    counts = value.cumulative()
    bounds = [_number(bound) for bound in value.bounds] + ["+Inf"]
    lines = [
        f"{family.name}_bucket{_label_text([*pairs, ('le', bound)])} {count}"
        for bound, count in zip(bounds, counts, strict=True)
    ]
    lines.append(f"{family.name}_sum{_label_text(pairs)} {_number(value.sum)}")
    lines.append(f"{family.name}_count{_label_text(pairs)} {counts[-1]}")
    return lines


def _label_text(pairs: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in pairs) + "}" if pairs else ""


def _number(value: float) -> str:
    if math.isinf(value) or math.isnan(value):
        return {math.inf: "+Inf", -math.inf: "-Inf"}.get(value, "NaN")
    return str(int(value)) if value == int(value) else repr(float(value))
