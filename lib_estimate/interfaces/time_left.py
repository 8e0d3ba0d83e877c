"""How far a run is and how long it still takes: what is planned, at the pace that is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lib_estimate.progress import Cost, Planned


@dataclass
class Pace:
    """Seconds of a U-Net forward, and by phase of what is computed without the U-Net, per forward's worth."""

    seconds: float = 0.0
    forwards: int = 0
    aside: dict[str, tuple[float, float]] = field(default_factory=dict)  # phase -> seconds, worth

    def of(self, costs: Iterable[Cost]) -> float | None:
        """Seconds that these take; None where no U-Net has run yet."""
        if not self.forwards:
            return None
        forward, whole = self.seconds / self.forwards, 0.0
        for cost in costs:
            seconds, worth = self.aside.get(cost.phase, (0.0, 0.0))
            whole += cost.forwards * forward + cost.aside * (seconds / worth if worth else forward)
        return whole


class TimeLeft:
    """Follows a run through its phases."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.started = clock, clock()
        self.pace = Pace()
        self.fraction = 0.0  # never falls
        self.plan: Planned | None = None
        self.at, self.share = -1, 0.0  # which phase of the plan, and how much of it is done
        self.begun = 0  # forwards when the phase began
        self.seen, self.spent = self.started, 0

    def begin(self, plan: Planned) -> None:
        """What is said so replaces what was said before."""
        self.plan, self.at, self.share = plan, -1, 0.0
        self.seen, self.spent = self.clock(), plan.spent()

    def move(self, phase: str, share: float) -> None:
        """A phase goes on, of which a share is done."""
        if self.plan is None:
            return
        later = range(max(self.at, 0), len(self.plan.costs))
        found = next((number for number in later if self.plan.costs[number].phase == phase), self.at)
        if found < 0:
            return
        now, spent, cost = self.clock(), self.plan.spent(), self.plan.costs[found]
        first = self.at < 0  # where a model is still being put in its place
        if found != self.at:
            self.begun, self.at, self.share = spent - round(share * cost.forwards), found, 0.0
        if spent > self.spent and not first:
            self.pace.seconds, self.pace.forwards = (
                self.pace.seconds + now - self.seen,
                self.pace.forwards + spent - self.spent,
            )
        elif cost.aside and spent == self.spent:
            seconds, worth = self.pace.aside.get(phase, (0.0, 0.0))
            more = max(0.0, share - self.share) * cost.aside
            self.pace.aside[phase] = seconds + now - self.seen, worth + more
        self.share, self.seen, self.spent = share, now, spent
        self._advance()

    def _to_come(self) -> list[Cost]:
        if self.plan is None:
            return []
        if self.at < 0:
            return list(self.plan.costs)
        cost = self.plan.costs[self.at]
        rest = max(0, cost.forwards - (self.spent - self.begun))
        return [Cost(cost.phase, rest, (1 - self.share) * cost.aside), *self.plan.costs[self.at + 1 :]]

    def left(self) -> float | None:
        """Seconds."""
        return self.pace.of(self._to_come()) if self.plan else None

    def _advance(self) -> None:
        left, spent = self.left(), self.clock() - self.started
        if left is not None:
            self.fraction = max(self.fraction, min(0.999, spent / max(spent + left, 1e-9)))
