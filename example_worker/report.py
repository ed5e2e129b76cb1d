"""What the demo prints: plain text, at most 100 columns. Knows the shape of the answers, decides nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

_HEAD: Final = ("node", "process", "lookups", "L1", "L2", "waited", "computed", "avoided", "saved", "L1 size", "lease")
_FORM: Final = "{:<5} {:>8} {:>8} {:>7} {:>7} {:>7} {:>9} {:>8} {:>9} {:>8}  {}"
_COUNTERS: Final = ("l1_hits", "l2_hits", "coalesced", "loads", "load_seconds", "l1_entries")


class Claims:
    """What was claimed, in order, and whether it was true."""

    def __init__(self) -> None:
        self._all: list[tuple[str, bool]] = []

    def __len__(self) -> int:
        return len(self._all)

    def add(self, text: str, is_true: bool) -> None:  # noqa: FBT001 - reads as a sentence
        """Claim *text*."""
        self._all.append((text, is_true))

    @property
    def failed(self) -> list[str]:
        """The claims that were not true."""
        return [text for text, is_true in self._all if not is_true]

    def show(self) -> None:
        """Print every claim."""
        print("\nclaims")
        for text, is_true in self._all:
            print(f"  {'ok' if is_true else 'NOT TRUE':<8} {text}", flush=True)


def stats_lines(reports: Mapping[int, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table of lookups, a line for each process and one for all."""
    total = {name: sum(report["stats"][name] for report in reports.values()) for name in _COUNTERS}
    cost = total["load_seconds"] / total["loads"] if total["loads"] else 0.0
    yield ""
    yield _FORM.format(*_HEAD)
    for pid, report in reports.items():
        yield _stats_line(report["node"], str(pid), report["stats"], cost, report["stats"]["lease"])
    yield _stats_line("all", "", total, cost, "")
    yield "  lookups = L1 + L2 (Redis) + waited (for the same work) + computed; avoided = all but computed;"
    yield f"  saved = avoided x {cost * 1000:.1f} ms, the mean time of those that were done"
    lags = [report["stats"]["invalidation_lag"] for report in reports.values()]
    heard = sum(lag["count"] for lag in lags)
    if heard:
        mean = sum(lag["count"] * lag["mean"] for lag in lags) / heard
        worst = max(lag["max"] for lag in lags)
        yield f"  invalidations heard: {heard}, after {mean * 1000:.1f} ms on average, {worst * 1000:.1f} ms at worst"
    yield ""


def _stats_line(node: str, pid: str, stats: Mapping[str, Any], cost: float, lease: str) -> str:
    l1, l2, waited, computed = (int(stats[name]) for name in ("l1_hits", "l2_hits", "coalesced", "loads"))
    avoided = l1 + l2 + waited
    saved = f"{avoided * cost:.2f} s"
    numbers = (avoided + computed, l1, l2, waited, computed, avoided, saved, int(stats["l1_entries"]))
    return _FORM.format(node, pid, *numbers, lease).rstrip()


def invalidation_lines(sku: str, rows: list[dict[str, Any]], changed_at: float) -> Iterator[str]:
    """Yield the table of one price change: what each process quoted before and after, and when."""
    yield f"one change of the price of {sku}, seen from inside each process:"
    yield "node   process  old quote    new quote  old one given up after  new one answered after"
    for row in rows:
        gone = row["withdrawn_at"]
        given_up = "(it made the change)" if gone is None else f"{(gone - changed_at) * 1000:.1f} ms"
        answered = f"{(row['answered_at'] - changed_at) * 1000:.1f} ms"
        new = "none" if row["new"] is None else row["new"]
        yield f"{row['node']:<5} {row['pid']:>8} {row['old']:>10} -> {new:>10}  {given_up:>22}  {answered:>22}"
