"""The table of the campaign: what each scenario met, and how often that went wrong."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from functional.harness.steps import Taken

_LINE = "{:<22}{:<9}{:>8}{:>7}{:>10}{:>9}"
_HEAD = _LINE.format("scenario", "trouble", "rounds", "hits", "failures", "seconds")


@dataclass(kw_only=True, slots=True)
class Row:
    scenario: str
    trouble: str
    rounds: int = 0
    hits: int = 0
    """Rounds in which the trouble came to something."""
    misses: int = 0
    """Rounds since the last of those."""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def note(self, at: str, taken: Taken, problem: str | None) -> None:
        """Count a round."""
        self.rounds += 1
        if taken.hit is None:
            self.misses += 1
        else:
            self.hits += 1
            self.misses = 0
        if problem is not None:
            self.problems.append(f"{at} ({taken.hit}): {problem}")

    def assert_well(self) -> None:
        assert not self.problems, "\n\n".join(self.problems)
        assert self.hits or not self.rounds, "no trouble came to it"

    def __str__(self) -> str:
        counts = (self.rounds, self.hits, len(self.problems), round(self.seconds))
        return _LINE.format(self.scenario, self.trouble, *counts)


class Table:
    """Shows each row when it is done, for it takes long until all are.

    Args:
        show: is given what there is to say, in whole lines.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._rows: list[Row] = []

    @contextmanager
    def row(self, scenario: str, trouble: str) -> Iterator[Row]:
        """Take the time of a row while it is filled, and show it then."""
        row = Row(scenario=scenario, trouble=trouble)
        self._rows.append(row)
        began = time.monotonic()
        try:
            yield row
        finally:
            row.seconds = time.monotonic() - began
            self._show("\n".join(["", str(row), *row.problems]))

    def __str__(self) -> str:
        return "\n".join([_HEAD, *map(str, self._rows), _total(self._rows)])


def _total(rows: Sequence[Row]) -> str:
    total = Row(scenario="all", trouble="")
    for row in rows:
        total.rounds += row.rounds
        total.hits += row.hits
        total.seconds += row.seconds
        total.problems += row.problems
    return str(total)
