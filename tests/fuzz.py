"""The properties of tests/hostile.py with new cases each time: `python -m tests.fuzz --minutes N [PROPERTY ...]`.

Ends with how many cases of each were tried and the slowest of them, or with the first case that fails.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import time
import traceback

from tests.hostile import PROPERTIES, hold

AT_ONCE = 300  # cases of a property before the next has its turn
TOO_LONG = 30  # seconds for one case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("properties", nargs="*", choices=[*PROPERTIES, []], metavar="PROPERTY")
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, _too_long)
    end, tried = time.monotonic() + 60 * args.minutes, dict.fromkeys(args.properties or PROPERTIES, 0)
    slowest = dict.fromkeys(tried, 0.0)
    while time.monotonic() < end:
        for name in tried:
            seed = random.SystemRandom().randrange(2**32)
            watch = _Watch()
            try:
                tried[name] += hold(PROPERTIES[name], AT_ONCE, seed, watch.finished)
            except BaseException:  # noqa: BLE001 - a failure is shown, whatever it is
                traceback.print_exc()
                print(f"\nFAILED: {name}, seed {seed}. Tried before: {tried}")
                return 1
            finally:
                signal.alarm(0)
            slowest[name] = max(slowest[name], watch.slowest)
    for name, count in tried.items():
        print(f"{name:<14} {count:>8} cases, none failed; the slowest took {slowest[name]:.2f} s")
    print(
        f"{sum(tried.values())} cases; at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MB of memory"
    )
    return 0


class _Watch:
    """The slowest case; raises in one that takes too long."""

    def __init__(self) -> None:
        self.slowest, self.begun = 0.0, time.monotonic()
        signal.alarm(TOO_LONG)

    def finished(self) -> None:
        now = time.monotonic()
        self.slowest, self.begun = max(self.slowest, now - self.begun), now
        signal.alarm(TOO_LONG)


def _too_long(*_: object) -> None:
    raise AssertionError(f"one case took more than {TOO_LONG} s")


if __name__ == "__main__":
    sys.exit(main())
