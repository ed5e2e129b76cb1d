"""What is checked with celery-types: a cached task is a task, and a result is an AsyncResult of it."""
# ruff: noqa: D103 - checkers read these, nobody calls them

from __future__ import annotations

from typing import Any, ParamSpec, TypeVar, assert_type

from celery import Celery, Task, chain, group, shared_task
from celery.canvas import Signature
from celery.result import AsyncResult, EagerResult

from celery_mlcache import CachedTask, cached_task
from celery_mlcache.fleet.typing import CachedTaskOf

P = ParamSpec("P")
R = TypeVar("R")

app = Celery("shop")


class Base(Task[..., Any]):
    """A base class of the user's own."""

    colour = "red"


class CachedBase(CachedTask):
    """And one that is cached already."""


@cached_task(app=app, ttl=60)
def price(sku: str, qty: int = 1) -> int:
    return len(sku) * qty


@cached_task(app=app, base=Base, bind=True)
def on_base(self: Base, sku: str) -> str:
    return self.colour + sku


@cached_task(base=CachedBase)
def on_cached_base(sku: str) -> str:
    return sku


@cached_task(bind=True)
def bound(self: Task[..., Any], sku: str) -> str:
    return self.request.id or sku


assert_type(price.delay("a", qty=2), AsyncResult[int])
assert_type(price.delay("a").get(), int)
assert_type(price.apply_async(("a",), {"qty": 2}, mlcache="stale-ok", countdown=1), AsyncResult[int])
assert_type(price.cache.refresh_async("a"), AsyncResult[int])
assert_type(price.s(qty=2), Signature[int])
assert_type(price.si("a"), Signature[int])
assert_type(price.signature(("a",)), Signature[int])
assert_type(price.apply(("a",)), EagerResult[int])
assert_type(price.run("a"), int)
assert_type(price.name, str)
assert_type(price.app, Celery)
assert_type(price.AsyncResult("id"), AsyncResult[int])
assert_type(on_base.delay("a").get(), str)
assert_type(on_cached_base.cache.refresh("a"), str)
assert_type(bound.delay("a"), AsyncResult[str])
chain(price.s("a"), on_base.s()).delay()
group(price.s(sku) for sku in ("a", "b")).delay()
price.chunks([("a", 1)], 10)
price.map(["a"])
price.starmap([("a", 1)])


def send(task: Task[P, R], *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
    """Take any task, and know its parameters."""
    return task.delay(*args, **kwargs)


assert_type(send(price, "a", qty=2), AsyncResult[int])
assert_type(send(bound, "a"), AsyncResult[str])


def name_of(task: CachedTaskOf[..., object]) -> str:
    return task.name


number = price.delay("a")
number.get() + "1"  # E: it is an int
other: CachedTaskOf[[int], int] = price  # E: it takes a str
cached_task(app="shop")(name_of)  # E: an app
cached_task(base=int)(name_of)  # E: a task class
send(price, "a", qtty=2)  # E: no such parameter

# What cannot be checked. The attributes of a base: a ParamSpec and a class make no common type.
str(on_base.colour)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


# The long ways. A class has the parameters of its run() there, and nowhere else.
class Times(CachedTask):
    """A class-based task."""

    name = "times"

    def run(self, x: int, y: int = 2) -> int:
        return x * y


times = app.register_task(Times())
assert_type(times, Times)
assert_type(times.run(1, y=2), int)
times.delay("anything")


# With base=, celery-types says that the task is one of that class, and no more.
@app.task(base=CachedTask, mlcache={"ttl": 60})
def long_way(sku: str) -> str:
    return sku


assert_type(long_way, CachedTask)
long_way.delay("a", "anything")
long_way.cache.invalidate("a")


@shared_task(base=CachedTask, mlcache={"ttl": 60})
def long_shared_way(sku: str) -> str:
    return sku


assert_type(long_shared_way, CachedTask)
