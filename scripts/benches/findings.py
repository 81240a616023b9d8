"""What a benchmark found: figures for the last line, a table for people, and what was wanted.

Use: `findings = Findings("loader", figures, rows, wanted)`; `print(findings.text())`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.benches.measuring import Ratio

SURE = 3.0  # a ratio has to be so many times as far from 1 as that of a way to itself


@dataclass(frozen=True)
class Findings:
    """What a benchmark found.

    Args:
        name: of the benchmark.
        figures: all of them, as JSON.
        rows: of the table, headings first.
        ratios: what they are called in JSON, by wall time.
        wanted: the least that a ratio should be.
        errors: for each ratio of two ways, that of one way to itself, which says what measuring errs by.
        most: the most that a ratio should be.
        notes: lines under the table.
    """

    name: str
    figures: Mapping[str, Any]
    rows: Sequence[Sequence[str]]
    ratios: Mapping[str, Ratio]
    wanted: Mapping[str, float]
    errors: Mapping[str, str]
    most: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def document(self) -> dict[str, Any]:
        """Returns the JSON object of the last line."""
        values = {name: round(each.value, 4) for name, each in self.ratios.items()}
        intervals = {
            name: None if each.interval is None else [round(end, 4) for end in each.interval]
            for name, each in self.ratios.items()
        }
        judged = {
            **({"wanted": self.wanted} if self.wanted else {}),
            **({"wanted_at_most": self.most} if self.most else {}),
            "not_told_from_1": self.not_told(),
        }
        return {"bench": self.name, **values, "intervals": intervals, **judged, **self.figures}

    def not_told(self) -> list[str]:
        """Returns the ratios that may be 1: their interval holds it, or measuring errs by a third as much."""
        distance = {name: abs(each.value - 1) for name, each in self.ratios.items()}
        near = {name for name, error in self.errors.items() if distance[name] < SURE * distance[error]}
        return [name for name in self.errors if name in near or _holds_1(self.ratios[name].interval)]

    def line(self) -> str:
        """Returns the document as one line."""
        return json.dumps(self.document())

    def text(self) -> str:
        """Returns the table, and each ratio with its interval and what was wanted."""
        widths = [max(len(row[column]) for row in self.rows) for column in range(len(self.rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) if not i else cell.rjust(width) for i, (cell, width) in cells)
            for cells in (list(enumerate(zip(row, widths, strict=True))) for row in self.rows)
        ]
        width = max(map(len, self.ratios), default=0)
        for name, found in self.ratios.items():
            least, most = self.wanted.get(name), self.most.get(name)
            verdict = "" if least is None else f"  wanted {least:g}: {_verdict(found, least)}"
            if most is not None:
                verdict = f"  wanted at most {most:g}: {_verdict(found, most, at_most=True)}"
            unsure = "  (not told apart from 1)" if name in self.not_told() else ""
            lines.append(f"{name.ljust(width)}  {found}{verdict}{unsure}")
        return "\n".join([*lines, *self.notes])


def _verdict(found: Ratio, wanted: float, at_most: bool = False) -> str:
    said = "met" if (found.value <= wanted if at_most else found.value >= wanted) else "missed"
    sure = found.interval is not None and not found.interval[0] < wanted <= found.interval[1]
    return said if sure else f"{said}, but not surely"


def _holds_1(interval: tuple[float, float] | None) -> bool:
    return interval is not None and interval[0] <= 1 <= interval[1]


def cell(value: float | None, form: str = ",.0f") -> str:
    """Returns a number for the table, "-" where there is none."""
    return "-" if value is None else format(value, form)
