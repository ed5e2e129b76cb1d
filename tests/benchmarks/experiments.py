"""What goes wrong, how often: the usual cache and ours in the same experiments.

``python -m tests.benchmarks.experiments [NAME ...]`` prints the table; the tests hold it (tests/faults).
"""

from __future__ import annotations

import os
import platform
import sys
import time

from tests.faults.experiments import EXPERIMENTS, WITHOUT_TOKEN, Experiment, Result
from tests.faults.players import Fleet, Protocol
from tests.support.servers import RedisServer

BOUND = 1.0  # staleness_bound, as it is by default
PROTOCOLS: tuple[Protocol, ...] = ("naive", "ours")


def measure(experiment: Experiment, control: RedisServer, fleets: dict[Protocol, Fleet]) -> dict[Protocol, Result]:
    """Run one on both protocols."""
    if experiment.is_rough:
        return {protocol: experiment.on(protocol, control, BOUND) for protocol in PROTOCOLS}
    return {protocol: experiment.run(fleets[protocol]) for protocol in PROTOCOLS}


def main() -> int:
    """Print the table; exit 1 if ours was ever wrong where it must not be."""
    chosen = set(sys.argv[1:])
    began, has_failed = time.monotonic(), False
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, staleness_bound {BOUND:g} s")
    print(f"{'wrong of all rounds':<72}{'naive':>12}{'ours':>12}{'load':>7}")
    with (
        RedisServer() as control,
        Fleet("naive", control, bound=BOUND) as naive,
        Fleet("ours", control, bound=BOUND) as ours,
    ):
        for experiment in (*EXPERIMENTS, *WITHOUT_TOKEN):
            if chosen and experiment.name not in chosen:
                continue
            found = measure(experiment, control, {"naive": naive, "ours": ours})
            for what in found["ours"].wrong:
                cells = "".join(f"{f'{found[each].wrong[what]} / {found[each].of}':>12}" for each in PROTOCOLS)
                print(f"{f'{experiment.title}: {what}':<72}{cells}{os.getloadavg()[0]:>7.2f}", flush=True)
            has_failed |= experiment in EXPERIMENTS and any(found["ours"].wrong.values())
    print(f"{time.monotonic() - began:.0f} s")
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
