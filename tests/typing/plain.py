"""What is checked with and without celery-types: the arguments, and results that come straight from a call."""
# ruff: noqa: D103 - checkers read these, nobody calls them

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal, assert_type

from celery_mlcache import MISS, cached_task
from celery_mlcache.entry import Missing
from celery_mlcache.fleet.typing import CachedTaskOf, Mode, TaskCacheOf


class NoSuchPriceError(Exception):
    """Cached by one of the tasks below."""


@cached_task
def bare(sku: str, qty: int = 1) -> int:
    return len(sku) * qty


@cached_task()
def empty(sku: str, qty: int = 1) -> int:
    return len(sku) * qty


def shop(arguments: Mapping[str, Any], result: Any) -> list[str]:
    return [f"shop:{arguments['shop']}:{result}"]


@cached_task(
    ttl=timedelta(minutes=5),
    jitter=0.1,
    cache_if=bool,
    cache_none=False,
    negative={NoSuchPriceError: 5, KeyError: timedelta(seconds=1)},
    max_size=10_000,
    tags=["prices", "sku:{sku}"],
    ignore=["qty"],
    key="price:{sku}",
    version="source",
    vary={"tenant": lambda: "de"},
    stale_ttl=60,
    stale_if_error=(NoSuchPriceError, OSError),
    early=True,
    refresh_queue="slow",
    refresh_priority=9,
    on_contention="stale",
    max_wait=timedelta(seconds=3),
    producer=True,
    coalesce=True,
    name="shop.price",
    rate_limit="10/s",
    acks_late=True,
    autoretry_for=(OSError,),
    colour="an attribute of one's own",
)
def price(sku: str, qty: int = 1, *, shop: str = "main") -> int:
    return len(sku) * qty * len(shop)


@cached_task(ttl=lambda result: result or None, tags=shop, vary=[lambda: 1], stale_if_error=OSError, version=2)
def hooked(sku: str, *rest: int, shop: str = "main", **more: float) -> dict[str, float]:
    return {sku: len(rest), shop: 1, **more}


@cached_task(bind=True, ttl=60)
def bound(self: Any, sku: str, qty: int = 1) -> tuple[str, int]:
    return self.request.id or sku, qty


@cached_task(pydantic=True)
def loose(sku: str) -> int:
    return len(sku)


@cached_task(bind=True, pydantic=True, ttl=60)
def loose_and_bound(self: Any, sku: str) -> int:
    return len(sku)


def inline(sku: str) -> int:
    return len(sku)


made = cached_task(ttl=60)(inline)

assert_type(bare("a", 2), int)
assert_type(empty(sku="a"), int)
assert_type(price("a", qty=2, shop="x"), int)
assert_type(hooked("a", 1, 2, shop="x", rate=1.5), dict[str, float])
assert_type(bound("a", qty=2), tuple[str, int])
assert_type(made("a"), int)
loose.delay({"sku": "a"})
loose_and_bound.delay("a")

price.delay("a", qty=2)
bound.delay("a", 2)
price.si("a", qty=2)
price.s(qty=2)  # the sku is what the task before it in a chain returns
price.apply_async(("a",), {"qty": 2}, mlcache="refresh", countdown=5, queue="slow")
mode: Mode = "only"
price.apply_async(["a"], mlcache=mode)

cache: TaskCacheOf[..., int] = price.cache
assert_type(price.cache.key("a", qty=2), str)
assert_type(price.cache.tags("a"), tuple[str, ...])
assert_type(price.cache.get("a"), int | Literal[Missing.MISS])
assert_type(price.cache.set(5, "a", qty=2), bool)
assert_type(price.cache.invalidate("a", shop="x"), bool)
assert_type(price.cache.invalidate_all(), bool)
assert_type(price.cache.refresh("a"), int)
assert_type(bound.cache.refresh("a"), tuple[str, int])
assert_type(price.cache.original("a"), int)
assert_type(price.cache.warm([("a",), ("b", 2)], batch=10), int)
price.cache.warm([{"sku": "a"}, price.s("b")])
price.apply(("a",), {"qty": 2}, mlcache="bypass", throw=True)
price.cache.refresh_async("a")
price.cache.explain("a")
price.cache.manager.invalidate_tags("prices")
with price.cache.using("bypass"):
    price("a")

found = price.cache.get("a")
if found is not MISS:
    assert_type(found, int)


def total(task: CachedTaskOf[[str, int], int], skus: list[str]) -> int:
    return sum(task(sku, 1) for sku in skus)


total(bare, ["a", "b"])
total(empty, ["a", "b"])
