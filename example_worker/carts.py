"""What customers order. The same seed gives the same carts; a few articles sell far more often than all others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate
from typing import Final, TypedDict

from example_worker import shop

STEEPNESS: Final = 1.3  # of Zipf's law: the n-th best seller is ordered 1 / n**1.3 times as often as the first


class Cart(TypedDict):
    """A cart as it travels through the broker; *lines* are ``(sku, quantity)``, which JSON turns into lists."""

    number: int
    currency: str
    country: str
    lines: list[tuple[str, int]]


def best_sellers(seed: int) -> list[str]:
    """Return every article, the most popular first."""
    ranked = shop.skus()
    random.Random(seed).shuffle(ranked)
    return ranked


def carts(seed: int, *, first: int = 0) -> Iterator[Cart]:
    """Yield carts without end, numbered from *first*."""
    ranked = best_sellers(seed)
    weights = list(accumulate(1.0 / rank**STEEPNESS for rank in range(1, len(ranked) + 1)))
    rng = random.Random(f"{seed}:{first}")
    number = first
    while True:
        wanted = dict.fromkeys(rng.choices(ranked, cum_weights=weights, k=rng.randint(1, 7)))
        yield Cart(
            number=number,
            currency=rng.choice(list(shop.RATES)),
            country=rng.choice(list(shop.TARIFFS)),
            lines=[(sku, rng.choice((1, 1, 1, 2, 3))) for sku in wanted],
        )
        number += 1
