"""The domain: a database of record and slow rules over it. Knows neither Celery nor a cache.

Every function opens its own SQLite connection: some 0.1 ms beside the tens of milliseconds of a rule, and nothing
that a forked worker process could inherit. Prices are whole cents inside and ``Decimal`` euros outside.

Two calls stand for remote services, a bank's exchange rates and a carrier's tariff. **They are simulated**: a sleep
of `RATE_LATENCY` or `TARIFF_LATENCY` seconds and a fixed table. The pricing rule is not: its SQL and its sums are run.
"""

from __future__ import annotations

import bisect
import csv
import math
import os
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from decimal import Decimal
from functools import wraps
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

CATALOGUE: Final = Path(__file__).with_name("catalogue.csv")
RATE_LATENCY: Final = 0.04  # seconds: what a call to a bank's service would take
TARIFF_LATENCY: Final = 0.03  # seconds: what a call to a carrier's service would take
SHOPPERS: Final = 6_000  # drawn for each quote
RATES: Final = {"EUR": "1", "USD": "1.0837", "GBP": "0.8421", "SEK": "11.2650", "PLN": "4.3120"}
TARIFFS: Final = {"DE": (390, 45), "FR": (690, 80), "NL": (590, 70), "PL": (640, 65), "SE": (990, 120), "AT": (620, 70)}
WEIGHT_CLASSES: Final = (1, 2, 5, 10, 20, 31)  # kilograms; heavier carts go as several parcels

P = ParamSpec("P")
R = TypeVar("R")

work_done: Counter[str] = Counter()
"""How often *this process* really ran each slow rule: the witness that the cache's own counters are checked against."""


class UnknownArticleError(LookupError):
    """No article has that number."""

    def __init__(self, sku: str) -> None:
        super().__init__(sku)

    def __str__(self) -> str:
        """Name the number."""
        return f"no article {self.args[0]!r}"


def _counted(rule: Callable[P, R]) -> Callable[P, R]:
    @wraps(rule)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        work_done[rule.__name__] += 1
        return rule(*args, **kwargs)

    return run


def database_path() -> str:
    """Return where the database of record is: ``SHOP_DB``, or ``shop.sqlite3`` in the working directory."""
    return os.environ.get("SHOP_DB") or "shop.sqlite3"


@contextmanager
def _database() -> Iterator[sqlite3.Connection]:
    # isolation_level=None: transactions are written out where there are any.
    with closing(sqlite3.connect(database_path(), timeout=10.0, isolation_level=None)) as db:
        yield db


def skus() -> list[str]:
    """Return every article number of the shipped catalogue, in its order."""
    with CATALOGUE.open(encoding="utf-8", newline="") as file:
        return [row["sku"] for row in csv.DictReader(file)]


def load_catalogue() -> int:
    """Fill the database from the shipped catalogue unless that was done before; return the number of articles.

    Any number of processes may call it at once: the first to get SQLite's write lock does the work.
    """
    with _database() as db:
        db.execute("BEGIN IMMEDIATE")
        if not db.execute("PRAGMA user_version").fetchone()[0]:
            db.execute(
                "CREATE TABLE article (sku TEXT PRIMARY KEY, name TEXT, category TEXT, brand TEXT,"
                " list_cents INTEGER, base_cents INTEGER, cost_cents INTEGER, weight_g INTEGER)"
            )
            with CATALOGUE.open(encoding="utf-8", newline="") as file:
                db.executemany("INSERT INTO article VALUES (?,?,?,?,?,?,?,?)", map(_row, csv.DictReader(file)))
            db.execute("PRAGMA user_version = 1")
        count: int = db.execute("SELECT count(*) FROM article").fetchone()[0]
        db.execute("COMMIT")
        return count


def _row(article: dict[str, str]) -> tuple[str | int, ...]:
    price = round(Decimal(article["base_price"]) * 100)
    cost, weight = round(Decimal(article["cost"]) * 100), int(article["weight_g"])
    return article["sku"], article["name"], article["category"], article["brand"], price, price, cost, weight


# The market is seen through list prices, which never change here; so a changed base price concerns one quote only,
# and invalidating that one is enough.
_MARKET = """
    WITH market AS (
        SELECT sku, base_cents, cost_cents, list_cents, weight_g, category,
               percent_rank() OVER (PARTITION BY category ORDER BY list_cents) AS dearness,
               avg(1.0 * (list_cents - cost_cents) / list_cents) OVER (PARTITION BY category) AS usual_margin
        FROM article)
    SELECT base_cents, cost_cents, list_cents, weight_g, category, dearness, usual_margin FROM market WHERE sku = ?"""
_RIVALS = """
    SELECT avg(list_cents) FROM (
        SELECT list_cents FROM article WHERE category = ? AND sku <> ?
        ORDER BY abs(list_cents - ?) + abs(weight_g - ?) LIMIT 12)"""


@_counted
def unit_price(sku: str) -> Decimal:
    """Return the price in euros at which one article should be sold now; takes some tens of milliseconds.

    It looks the article up in its market (SQL over the whole catalogue), draws what `SHOPPERS` shoppers would pay
    (seeded by the article's number, so that equal data give equal prices) and takes the most profitable price
    within 15 % of the base price.

    Raises:
        UnknownArticleError: No article has that number.
    """
    with _database() as db:
        row = db.execute(_MARKET, (sku,)).fetchone()
        if row is None:
            raise UnknownArticleError(sku)
        base, cost, listed, weight, category, dearness, usual_margin = row
        rivals = db.execute(_RIVALS, (category, sku, listed, weight)).fetchone()[0] or listed
    floor = max(cost / (1.0 - usual_margin / 2), 0.85 * base)  # never below half of the usual margin
    middle = base * (0.7 + 0.3 * rivals / listed) * (1.1 - 0.2 * dearness)
    best = _most_profitable(random.Random(sku), middle, floor, 1.15 * max(base, floor), cost)
    return Decimal(round(best / 5) * 5).scaleb(-2)


def _most_profitable(rng: random.Random, middle: float, low: float, high: float, cost: int) -> float:
    would_pay = sorted(rng.lognormvariate(math.log(middle), 0.35) for _ in range(SHOPPERS))
    candidates = (low + (high - low) * step / 40 for step in range(41))
    return max(candidates, key=lambda price: (price - cost) * (SHOPPERS - bisect.bisect_left(would_pay, price)))


def base_price(sku: str) -> Decimal:
    """Return the base price in euros.

    Raises:
        UnknownArticleError: No article has that number.
    """
    with _database() as db:
        row = db.execute("SELECT base_cents FROM article WHERE sku = ?", (sku,)).fetchone()
    if row is None:
        raise UnknownArticleError(sku)
    return Decimal(row[0]).scaleb(-2)


def set_base_price(sku: str, euros: Decimal) -> None:
    """Change the base price; it is committed, for every process, when this returns.

    Raises:
        UnknownArticleError: No article has that number.
    """
    with _database() as db:
        changed = db.execute("UPDATE article SET base_cents = ? WHERE sku = ?", (round(euros * 100), sku)).rowcount
    if not changed:
        raise UnknownArticleError(sku)


def weight_of(lines: list[tuple[str, int]]) -> int:
    """Return the grams of a cart's lines ``(sku, quantity)``."""
    with _database() as db:
        weights = {sku: db.execute("SELECT weight_g FROM article WHERE sku = ?", (sku,)).fetchone() for sku, _ in lines}
    for sku, row in weights.items():
        if row is None:
            raise UnknownArticleError(sku)
    return sum(weights[sku][0] * quantity for sku, quantity in lines)


def parcels(grams: int) -> list[int]:
    """Return the weight classes, in kilograms, of the parcels that *grams* go into."""
    heaviest = WEIGHT_CLASSES[-1]
    full, rest = divmod(grams, heaviest * 1000)
    last = [next(kilos for kilos in WEIGHT_CLASSES if rest <= kilos * 1000)] if rest else []
    return [heaviest] * full + last


@_counted
def exchange_rate(currency: str) -> Decimal:
    """Return how much of *currency* a euro buys; **simulates** a remote service (a sleep and a fixed table)."""
    time.sleep(RATE_LATENCY)
    return Decimal(RATES[currency])


@_counted
def parcel_tariff(country: str, kilos: int) -> Decimal:
    """Return the euros for one parcel; **simulates** a remote service (a sleep and a fixed table)."""
    time.sleep(TARIFF_LATENCY)
    first, each = TARIFFS[country]
    return Decimal(first + each * kilos).scaleb(-2)
