"""Write ``catalogue.csv``: ``python -m example_worker.make_catalogue``. Same seed, same file, byte for byte."""

from __future__ import annotations

import csv
import io
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

CATALOGUE: Final = Path(__file__).with_name("catalogue.csv")
COLUMNS: Final = ("sku", "name", "category", "brand", "base_price", "cost", "weight_g")
SEED: Final = 20260213


class Kind(NamedTuple):
    """What one category sells; prices in euros, weights in grams."""

    code: str
    brands: tuple[str, ...]
    makes: tuple[str, ...]
    things: tuple[str, ...]
    sizes: tuple[str, ...]
    price: tuple[float, float]
    weight: tuple[int, int]


KINDS: Final[dict[str, Kind]] = {
    "kitchen": Kind(
        "KIT",
        ("Nordhem", "Aldora", "Castel", "Brennwald"),
        ("stainless steel", "enamelled", "cast iron", "copper", "non-stick", "glass"),
        ("saucepan", "frying pan", "stock pot", "casserole", "milk pan", "roasting tin", "wok", "steamer"),
        ("16 cm", "20 cm", "24 cm", "28 cm"),
        (14.0, 145.0),
        (450, 5200),
    ),
    "tools": Kind(
        "TOO",
        ("Hartwig", "Ostmark & Son", "Ridgeline"),
        ("forged", "insulated", "ratcheting", "folding", "magnetic", "heavy-duty"),
        ("hammer", "screwdriver set", "pliers", "hex key set", "chisel", "spanner set", "handsaw", "clamp"),
        ("small", "medium", "large", "workshop pack"),
        (6.5, 120.0),
        (120, 3900),
    ),
    "garden": Kind(
        "GAR",
        ("Fernbrook", "Lindqvist", "Verdano"),
        ("galvanised", "bamboo", "terracotta", "recycled", "powder-coated", "larch"),
        ("planter", "watering can", "trellis", "bird table", "compost bin", "hose reel", "raised bed", "rake"),
        ("S", "M", "L", "XL"),
        (8.0, 190.0),
        (300, 14500),
    ),
    "office": Kind(
        "OFF",
        ("Papier Vogel", "Inkwell", "Tessera"),
        ("recycled", "hardcover", "dotted", "lined", "refillable", "A5", "A4"),
        ("notebook", "ring binder", "desk pad", "document wallet", "calendar", "clipboard", "sketchbook"),
        ("single", "pack of 3", "pack of 5", "pack of 10"),
        (2.4, 38.0),
        (90, 2600),
    ),
    "outdoor": Kind(
        "OUT",
        ("Kestrel", "Fjellrav", "Moorland", "Altavia"),
        ("ultralight", "waterproof", "insulated", "three-season", "packable", "ripstop"),
        ("rucksack", "sleeping bag", "tent", "camping mat", "stove", "rain jacket", "head torch", "dry bag"),
        ("basic", "trail", "alpine", "expedition"),
        (17.0, 420.0),
        (140, 4800),
    ),
    "textiles": Kind(
        "TEX",
        ("Weberei Sommer", "Linum", "Halden"),
        ("cotton", "linen", "merino", "organic cotton", "washed linen", "brushed"),
        ("bath towel", "bed sheet", "duvet cover", "tea towel", "blanket", "cushion cover", "tablecloth"),
        ("50 x 100", "90 x 200", "140 x 200", "220 x 240"),
        (7.0, 165.0),
        (150, 2400),
    ),
}


def articles(count: int = 3000) -> Iterator[dict[str, str]]:
    """Yield *count* articles, the categories in turn; names are unique."""
    rng = random.Random(SEED)
    names = {category: _names(rng, kind) for category, kind in KINDS.items()}
    for number, category in zip(range(count), itertools.cycle(KINDS), strict=False):
        kind = KINDS[category]
        brand, make, thing, size = names[category].pop()
        # Bigger sizes cost and weigh more, with some noise: the pricing rules look for just such structure.
        scale = (kind.sizes.index(size) + 1 + rng.uniform(-0.4, 0.4)) / len(kind.sizes) * rng.betavariate(2.5, 2.0)
        low, high = kind.price
        price = round((low + (high - low) * scale) * 20) / 20
        weight = kind.weight[0] + (kind.weight[1] - kind.weight[0]) * scale * rng.uniform(0.7, 1.2)
        yield {
            "sku": f"{kind.code}-{number:04d}",
            "name": f"{make} {thing} {size}",
            "category": category,
            "brand": brand,
            "base_price": f"{price:.2f}",
            "cost": f"{price * rng.uniform(0.45, 0.72):.2f}",
            "weight_g": str(round(weight / 10) * 10 or 10),
        }


def _names(rng: random.Random, kind: Kind) -> list[tuple[str, str, str, str]]:
    names = list(itertools.product(kind.brands, kind.makes, kind.things, kind.sizes))
    rng.shuffle(names)
    return names


def render() -> str:
    """Return the whole file."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(articles())
    return out.getvalue()


if __name__ == "__main__":
    CATALOGUE.write_text(render(), encoding="utf-8")
    print(f"{CATALOGUE}: {CATALOGUE.stat().st_size} bytes")
