"""Each marked line is an error, with and without celery-types, and no other line is."""
# ruff: noqa: D103 - checkers read these, nobody calls them

from __future__ import annotations

from datetime import timedelta
from typing import Any

from celery_mlcache import cached_task


@cached_task
def bare(sku: str, qty: int = 1) -> int:
    return len(sku) * qty


@cached_task(ttl=60, tags=["sku:{sku}"], rate_limit="1/s")
def price(sku: str, qty: int = 1) -> int:
    return len(sku) * qty


@cached_task(bind=True, ttl=60)
def bound(self: Any, sku: str, qty: int = 1) -> int:
    return len(sku) * qty


bare.delay()  # E: sku is missing
bare.delay(5)  # E: sku is a str
bare.delay("a", qtty=2)  # E: no such parameter
bare("a", "b")  # E: qty is an int
price.delay("a", qty="2")  # E: qty is an int
price.delay("a", 2, 3)  # E: too many
price.si()  # E: sku is missing
price(5)  # E: sku is a str
bound.delay(None, "a")  # E: the task itself is not passed
bound.delay()  # E: sku is missing
bound("a", self=None)  # E: nor by name

price.cache.key(5)  # E: sku is a str
price.cache.tags()  # E: sku is missing
price.cache.get("a", qtty=2)  # E: no such parameter
price.cache.set("5", "a")  # E: the value is an int
price.cache.set(5)  # E: sku is missing
price.cache.invalidate()  # E: sku is missing
price.cache.refresh("a", "b")  # E: qty is an int
price.cache.refresh_async("a", "b")  # E: qty is an int
price.cache.explain("a", "b")  # E: qty is an int
bound.cache.key(None, "a")  # E: the task itself is not passed
price.cache.using("never")  # E: no such mode
price.cache.get("a") + 1  # E: it may be MISS
price.cache.keys("a")  # E: no such method
price.apply_async(("a",), mlcache="never")  # E: no such mode

text: str = price("a")  # E: it is an int


def function(sku: str) -> int:
    return len(sku)


cached_task(ttl="5")(function)  # E: a time is a number or a timedelta
cached_task(ttl=lambda result: "5")(function)  # E: and so is what a function returns
cached_task(jitter=timedelta(1))(function)  # E: it is a part, not a time
cached_task(cache_if=True)(function)  # E: a function
cached_task(negative=[KeyError])(function)  # E: a mapping to times
cached_task(negative={"KeyError": 5})(function)  # E: of classes
cached_task(tags=5)(function)  # E: a sequence of str, or a function
cached_task(ignore=5)(function)  # E: a sequence of str
cached_task(key=5)(function)  # E: a template, or a function
cached_task(version=1.5)(function)  # E: a whole number, or a text
cached_task(vary="tenant")(function)  # E: functions
cached_task(stale_if_error=int)(function)  # E: classes of exceptions
cached_task(refresh_priority="high")(function)  # E: a number
cached_task(on_contention="never")(function)  # E: one of five
cached_task(max_wait="5")(function)  # E: a time
cached_task("shop.price")  # E: a name is given by name
cached_task(60)  # E: and so is a ttl
