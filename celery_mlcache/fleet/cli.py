"""``celery -A app mlcache ...``: does its work once, in Redis; the backplane reaches every process of the fleet.

Celery imports this module for every one of its commands, so it imports little. Importing it also registers the
remote-control commands, without which ``celery control`` would not know their names.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click
from celery.bin.base import CeleryCommand, handle_preload_options

import celery_mlcache.fleet.control  # noqa: F401 - registers the commands

if TYPE_CHECKING:
    from celery_mlcache.fleet.app import Fleet
    from celery_mlcache.manager import CacheManager

UNAVAILABLE = 69  # sysexits.h EX_UNAVAILABLE, Celery's code for "no answer"


@click.group(name="mlcache")
def mlcache() -> None:
    """Look after the multi-level cache of a fleet."""


@mlcache.command(cls=CeleryCommand, context_settings={"ignore_unknown_options": False})
@click.argument("keys", nargs=-1, metavar="KEY...")
@click.option("-t", "--tag", "tags", multiple=True, metavar="TAG", help="What carries TAG; may be given several times.")
@click.option("-p", "--prefix", "prefixes", multiple=True, metavar="PREFIX", help="What begins with PREFIX; as --tag.")
@click.option("--all", "is_all", is_flag=True, help="Everything in the app's namespace.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before --all.")
@click.pass_context
@handle_preload_options
def invalidate(
    ctx: Any, keys: tuple[str, ...], *, tags: tuple[str, ...], prefixes: tuple[str, ...], is_all: bool, yes: bool
) -> None:
    """Remove KEYs, what carries a tag, what begins with a prefix, or everything, from L2 and from every process's L1.

    Exit status: 0 done; 2 wrong arguments; 69 Redis did not answer, so nothing is certain.
    """
    if bool(keys or tags or prefixes) == is_all:
        raise click.UsageError("give either keys, tags or prefixes to invalidate, or --all")
    fleet = _fleet(ctx.obj.app)
    from celery_mlcache.errors import CacheKeyError, ConfigurationError, RemoteStoreError  # noqa: PLC0415

    try:
        namespace = fleet.config.cache_namespace
        if is_all and not yes:
            click.confirm(f"Invalidate everything in {namespace!r}?", abort=True)
        with fleet.operator() as cache:
            if is_all:
                cache.clear()
                click.echo(f"everything in {namespace!r} is invalid, in L2 and in every L1")
            else:
                _invalidate(cache, keys, tags, prefixes)
    except (CacheKeyError, ConfigurationError) as exc:
        raise click.UsageError(str(exc)) from None
    except RemoteStoreError as exc:
        _fail(f"{exc}; the invalidation may or may not have happened")


def _invalidate(cache: CacheManager, keys: Sequence[str], tags: Sequence[str], prefixes: Sequence[str]) -> None:
    from celery_mlcache.keys import check_key, check_prefix, check_tags  # noqa: PLC0415 - as above

    for prefix in prefixes:  # all of them before any is done
        check_prefix(prefix)
    for key in keys:
        check_key(key)
    checked = check_tags(tags)
    if keys:
        removed = cache.delete_many(keys)
        click.echo(f"{removed} of {len(keys)} keys were in L2; every L1 follows")
    if checked:
        cache.invalidate_tags(*checked)
        click.echo(f"whatever carries {', '.join(checked)} is invalid, in L2 and in every L1")
    for prefix in prefixes:
        cache.invalidate_prefix(prefix)
        click.echo(f"whatever begins with {prefix} is invalid, in L2 and in every L1")


def _fleet(app: Any) -> Fleet:
    fleet: Fleet | None = importlib.import_module("celery_mlcache.fleet.app").find_fleet(app)
    if fleet is None:
        raise click.UsageError(f"the app {app.main!r} has no cache: call setup_cache(app) in its module")
    return fleet


def _fail(why: str) -> NoReturn:
    click.echo(f"Error: {why}", err=True)
    sys.exit(UNAVAILABLE)
