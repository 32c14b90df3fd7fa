"""What was measured in one run: samples under a section, a quantity and labels."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.stats import Summary, summarise

Label = str | int


@dataclass(frozen=True, slots=True)
class Measure:
    """The samples of one quantity under one set of conditions."""

    section: str
    quantity: str
    unit: str
    labels: dict[str, Label]
    samples: tuple[float, ...]

    @property
    def summary(self) -> Summary:
        return summarise(self.samples)


@dataclass(slots=True)
class Results:
    """Everything of one run. `notes` are sentences on what could not be measured, and why."""

    facts: dict[str, Any]
    measures: list[Measure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, section: str, quantity: str, unit: str, samples: Iterable[float], **labels: Label) -> Measure:
        """Records samples. Raises ValueError when there are none: a section that measured nothing is a defect."""
        measure = Measure(section, quantity, unit, labels, tuple(round(sample, 4) for sample in samples))
        if not measure.samples:
            raise ValueError(f"{section}: no samples of {quantity} {labels}")
        self.measures.append(measure)
        return measure

    def select(self, section: str, quantity: str, **labels: Label) -> list[Measure]:
        """The measures with these labels, and any others besides."""
        return [
            measure
            for measure in self.measures
            if (measure.section, measure.quantity) == (section, quantity) and labels.items() <= measure.labels.items()
        ]

    def samples(self, section: str, quantity: str, **labels: Label) -> list[float]:
        """The samples of all measures with these labels, together."""
        return [sample for measure in self.select(section, quantity, **labels) for sample in measure.samples]

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "facts": self.facts,
            "measures": [
                {**dataclasses.asdict(measure), "summary": dataclasses.asdict(measure.summary)}
                for measure in self.measures
            ],
            "notes": self.notes,
        }


def medians(measures: Sequence[Measure], label: str) -> dict[Label, float]:
    """The median of each measure, by one of its labels."""
    return {measure.labels[label]: measure.summary.p50 for measure in measures}
