"""The example's domain, customers and health check; its tasks are run by ``tests/fleet/test_demo.py``."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from itertools import islice
from pathlib import Path

import pytest

from example_worker import make_catalogue, shop
from example_worker.carts import best_sellers, carts
from example_worker.healthcheck import complaint


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database of record of the test's own."""
    monkeypatch.setenv("SHOP_DB", str(tmp_path / "shop.sqlite3"))
    shop.load_catalogue()


def test_the_catalogue_is_what_its_generator_writes() -> None:
    """The shipped data can be made again byte for byte, is of a useful size and repeats no article."""
    text = make_catalogue.render()
    assert text == make_catalogue.CATALOGUE.read_text(encoding="utf-8")
    assert len(text.encode()) < 300_000
    assert len(set(shop.skus())) == 3000
    named = [tuple(line.split(",")[1:4]) for line in text.splitlines()]
    assert len(set(named)) == len(named)


def test_loading_twice_keeps_what_was_changed(database: None) -> None:
    """A worker that starts later does not put the old prices back."""
    shop.set_base_price("KIT-0000", Decimal("12.34"))
    assert shop.load_catalogue() == 3000
    assert shop.base_price("KIT-0000") == Decimal("12.34")


def test_equal_data_give_equal_prices(database: None) -> None:
    """A price depends on the data alone, follows its own base price, and no other article's."""
    before = {sku: shop.unit_price(sku) for sku in ("KIT-0000", "KIT-0006")}
    assert {sku: shop.unit_price(sku) for sku in before} == before
    shop.set_base_price("KIT-0000", shop.base_price("KIT-0000") * 2)
    assert shop.unit_price("KIT-0000") > before["KIT-0000"]
    assert shop.unit_price("KIT-0006") == before["KIT-0006"]


@pytest.mark.parametrize("ask", [shop.unit_price, shop.base_price, lambda sku: shop.weight_of([(sku, 1)])])
def test_an_unknown_article_is_an_error(database: None, ask) -> None:
    """Nothing is priced or weighed that is not in the catalogue, and the number is named."""
    with pytest.raises(shop.UnknownArticleError, match="NO-SUCH"):
        ask("NO-SUCH")


def test_slow_work_is_counted(database: None) -> None:
    """Each run of a slow rule is counted, for the demo to hold against the cache's own counters."""
    before = shop.work_done["unit_price"]
    shop.unit_price("KIT-0000")
    assert shop.work_done["unit_price"] == before + 1


@pytest.mark.parametrize(("grams", "expected"), [(0, []), (1, [1]), (1000, [1]), (1001, [2]), (31_001, [31, 1])])
def test_parcels_hold_the_weight(grams: int, expected: list[int]) -> None:
    """A cart goes in parcels of the smallest class that holds the rest."""
    assert shop.parcels(grams) == expected


def test_customers_want_the_same_things() -> None:
    """The same seed gives the same carts, no article twice in one, and the best seller far before all others."""
    wanted = list(islice(carts(7), 400))
    assert wanted == list(islice(carts(7), 400))
    assert wanted != list(islice(carts(8), 400))
    assert all(len(dict(cart["lines"])) == len(cart["lines"]) for cart in wanted)
    sold = Counter(sku for cart in wanted for sku, _ in cart["lines"])
    assert sold.most_common(1)[0][0] == best_sellers(7)[0]
    assert sold.total() > 3 * len(sold)


@pytest.mark.parametrize(("age", "is_well"), [(0, True), (19, True), (21, False)])
def test_the_health_check_reads_the_age_of_the_heartbeat(tmp_path: Path, age: float, is_well: bool) -> None:
    """A young file is health; an old one is not, and the age is told."""
    file = tmp_path / "heartbeat"
    file.touch()
    said = complaint({"SHOP_HEARTBEAT": str(file)}, file.stat().st_mtime + age)
    assert said is None if is_well else f"{age} s old" in str(said)


def test_no_heartbeat_is_no_health(tmp_path: Path) -> None:
    """A missing file and a missing name are complaints, not passes."""
    assert complaint({"SHOP_HEARTBEAT": str(tmp_path / "none")}, 0.0) is not None
    assert complaint({}, 0.0) is not None
