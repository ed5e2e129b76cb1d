"""``python -m example_worker.caller``: the shop's customers, for as long as they are let.

Prices a batch of carts a second through the workers and prints one line for each batch. Touches the heartbeat file
(see ``heartbeat.py``) after each batch that came back, so that a health check sees a fleet that no longer answers.
"""

from __future__ import annotations

import argparse
import signal
import threading
import time
from collections import Counter
from itertools import islice

from celery.exceptions import TimeoutError as NoAnswerError

from example_worker.carts import carts
from example_worker.heartbeat import touch
from example_worker.tasks import price_cart


def main(argv: list[str] | None = None) -> int:
    """Run until told to stop, or for a number of rounds; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m example_worker.caller", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=0, help="batches to price; 0 (the default): without end")
    parser.add_argument("--batch", type=int, default=20, help="carts in a batch (default 20)")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two batches (default 1)")
    options = parser.parse_args(argv)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    customers, done = carts(seed=7), 0
    while not stop.is_set() and (not options.rounds or done < options.rounds):
        began = time.monotonic()
        under_way = [price_cart.delay(cart) for cart in islice(customers, options.batch)]
        try:
            priced = [task.get(timeout=30.0) for task in under_way]
        except NoAnswerError:
            print("no answer within 30 s; the workers may be starting", flush=True)
            continue
        touch()
        done += 1
        by = Counter(f"{cart['node']}:{cart['pid']}" for cart in priced)
        took = (time.monotonic() - began) * 1000
        print(f"{len(priced)} carts in {took:.0f} ms by {', '.join(sorted(by))}", flush=True)
        stop.wait(options.pause)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
