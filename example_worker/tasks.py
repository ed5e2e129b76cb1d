"""The shop's tasks: what is cached, what uses the cache, and what changes the data.

`quote` and `exchange_rate` are *cached tasks*: calling them inside another task, or sending them with ``delay``,
answers from this process's memory (L1), else from Redis (L2), else computes. `price_cart` is a plain task that calls
them and keeps tariffs with ``cache.get_or_set``. `change_price` writes the database of record and then invalidates.

The last three tasks are for onlookers: each answers for the one worker process it happens to run in.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final

from celery import current_task

from celery_mlcache import cached_task
from example_worker import shop
from example_worker.app import app, cache
from example_worker.carts import Cart

CENT: Final = Decimal("0.01")


@cached_task(ttl=300, name="shop.quote")
def quote(sku: str) -> Decimal:
    """Return the price of one article in euros (slow: see `shop.unit_price`)."""
    return shop.unit_price(sku)


@cached_task(ttl=60, name="shop.exchange_rate")
def exchange_rate(currency: str) -> Decimal:
    """Return how much of *currency* a euro buys (a simulated remote call)."""
    return shop.exchange_rate(currency)


@app.task(name="shop.price_cart")
def price_cart(cart: Cart) -> dict[str, Any]:
    """Return the cart's total in its currency, the euro price of each line, and who computed it when."""
    began = time.monotonic()
    prices = {sku: quote(sku) for sku, _ in cart["lines"]}
    goods = sum((prices[sku] * quantity for sku, quantity in cart["lines"]), Decimal(0))
    postage = sum(
        (_tariff(cart["country"], kilos) for kilos in shop.parcels(shop.weight_of(cart["lines"]))), Decimal(0)
    )
    total = ((goods + postage) * exchange_rate(cart["currency"])).quantize(CENT)
    return {**_who(), "number": cart["number"], "total": total, "prices": prices, "began": began}


def _tariff(country: str, kilos: int) -> Decimal:
    tariff: Decimal = cache.get_or_set(f"tariff:{country}:{kilos}", lambda: shop.parcel_tariff(country, kilos), ttl=600)
    return tariff


@app.task(name="shop.change_price")
def change_price(sku: str, euros: Decimal) -> dict[str, Any]:
    """Change an article's base price and withdraw its quote from every process; return when that began.

    First the database, then the cache: the other way round, a reader between the two would fill the cache with the
    old price again.
    """
    shop.set_base_price(sku, euros)
    changed_at = time.monotonic()
    quote.cache.invalidate(sku)
    return {**_who(), "sku": sku, "changed_at": changed_at, "new": quote(sku), "answered_at": time.monotonic()}


@app.task(name="shop.refresh_rates", ignore_result=True)
def refresh_rates() -> int:
    """Fetch every exchange rate anew before it grows old, so that no customer waits for the bank."""
    for currency in shop.RATES:
        exchange_rate.cache.refresh(currency)
    return len(shop.RATES)


@app.task(name="shop.move_market", ignore_result=True)
def move_market() -> str:
    """Change the base price of some article by up to 10 %; return its number."""
    sku = random.choice(shop.skus())
    change_price(sku, (shop.base_price(sku) * Decimal(random.randint(90, 110)) / 100).quantize(CENT))
    return sku


@app.task(name="shop.process_report")
def process_report(hold: float) -> dict[str, Any]:
    """Return this process's cache statistics and the slow work it really did; keep the process busy *hold* seconds."""
    time.sleep(hold)  # so that equal tasks sent at the same time go to other processes
    return {**_who(), "stats": _plain(cache.stats()), "work": dict(shop.work_done)}


@app.task(name="shop.ask_quote")
def ask_quote(sku: str, hold: float) -> dict[str, Any]:
    """Return what this process answers for *sku* now; keep the process busy *hold* seconds."""
    price, at = quote(sku), time.monotonic()
    time.sleep(hold)
    return {**_who(), "price": price, "at": at}


@app.task(bind=True, name="shop.watch_quote")
def watch_quote(self: Any, sku: str, patience: float) -> dict[str, Any]:
    """Ask this process for a quote until it answers another one; return both and when that was.

    The state WATCHING tells the caller that the old price is in hand. Gives up after *patience* seconds, with
    ``new`` being None.
    """
    old = quote(sku)
    self.update_state(state="WATCHING", meta=_who())
    give_up = time.monotonic() + patience
    while (kept := quote.cache.get(sku)) == old and time.monotonic() < give_up:
        time.sleep(0.001)
    withdrawn_at = time.monotonic()
    new = None if kept == old else quote(sku)
    return {**_who(), "old": old, "new": new, "withdrawn_at": withdrawn_at, "answered_at": time.monotonic()}


def _who() -> dict[str, Any]:
    # The request knows the worker node; called without a worker, there is none.
    node = (current_task.request.hostname if current_task else None) or ""
    return {"pid": os.getpid(), "node": node.partition("@")[0]}


def _plain(stats: Mapping[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in stats.items()}
