"""Interleaved rounds: what lets figures of one run be compared with each other.

Every round measures every contestant once, one after the other; the order moves on by one place per round. A
ratio is formed within a round, where both numbers saw the same machine, and the median of the ratios counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Generic, TypeVar

import psutil
from contestants import BULKHEAD
from report import Line
from tables import median
from watchdog import watched

__all__ = ["Rounds", "measure_in_rounds"]

BUSY_SAMPLE_SECONDS = 0.5
"""While nothing of ours runs. A busy round is shown, not left out: choosing rounds would be choosing results."""

S = TypeVar("S")


@dataclass(frozen=True)
class Rounds(Generic[S]):
    """What was measured: for each contestant one sample per round.

    Attributes:
        samples: By name; a contestant that is not installed is not there.
        busy_percent: How much of the CPUs others used just before each round.
    """

    samples: dict[str, list[S]]
    busy_percent: list[float]

    def median(self, name: str, cost: Callable[[S], float]) -> float | None:
        """Return a contestant's median cost (seconds, bytes: less is better)."""
        return median(map(cost, self.samples[name])) if name in self.samples else None

    def ratio(self, peer: str, cost: Callable[[S], float], *, of: str = BULKHEAD.name) -> float | None:
        """Return the median over the rounds of the peer's cost divided by bulkhead's."""
        ours, theirs = self.samples.get(of), self.samples.get(peer)
        if not ours or not theirs:
            return None
        return median(cost(b) / cost(a) for a, b in zip(ours, theirs, strict=True))

    def line(
        self,
        question: str,
        peer: str,
        cost: Callable[[S], float],
        shown: Callable[[float], str],
        *,
        target: float | None = None,
        called: str | None = None,
        of: str = BULKHEAD.name,
    ) -> Line:
        """Return the comparison of bulkhead with a peer.

        Args:
            question: What is compared.
            peer: Its name among the samples.
            cost: What of a sample is compared.
            shown: Words a cost.
            target: What the ratio is to be at least.
            called: How the peer was used, if its name does not say that.
            of: bulkhead's name among the samples.
        """
        medians = (self.median(name, cost) for name in (of, peer))
        ours, theirs = ("" if value is None else shown(value) for value in medians)
        return Line(question, ours, called or peer, theirs, self.ratio(peer, cost, of=of), target)

    def print_busy(self) -> None:
        shares = ", ".join(f"{percent:.0f} %" for percent in self.busy_percent)
        print(f"  CPUs in use by others before each round: {shares}")

    def figures(self) -> dict[str, object]:
        """Return everything, for the JSON file."""
        samples = {name: [_plain(sample) for sample in of] for name, of in self.samples.items()}
        return {"busy_percent_before_round": self.busy_percent, "samples": samples}


def measure_in_rounds(names: Sequence[str], rounds: int, measure: Callable[[str], S]) -> Rounds[S]:
    """Call `measure` once per name and round, each time in the watchdog's sight."""
    samples: dict[str, list[S]] = {name: [] for name in names}
    busy: list[float] = []
    for number in range(rounds):
        busy.append(psutil.cpu_percent(BUSY_SAMPLE_SECONDS))
        for name in _rotate(names, number):
            with watched():
                samples[name].append(measure(name))
    return Rounds(samples, busy)


def _rotate(names: Sequence[str], places: int) -> list[str]:
    at = places % max(1, len(names))
    return [*names[at:], *names[:at]]


def _plain(sample: object) -> object:
    return asdict(sample) if is_dataclass(sample) and not isinstance(sample, type) else sample
