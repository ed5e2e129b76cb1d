"""What is stored for one call: the layout, and exceptions that come back as they were, or not at all."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.serialization import dumps, loads

from celery_mlcache.codec import Codec
from celery_mlcache.fleet.record import Record, pack_error, unpack, unpack_error
from celery_mlcache.wire import pack_head

NOON = 1_790_000_000.0
RECORD = Record([1, (2,)], 0.25, NOON, 60.0, "id@host")


class MissingError(Exception):
    """With attributes, and a constructor of its own."""

    def __init__(self, sku, shop="main"):
        super().__init__(f"no {sku} in {shop}")
        self.sku, self.shop = sku, shop


class MissingForEverError(MissingError):
    pass


class SlottedError(Exception):
    __slots__ = ("code",)

    def __init__(self, code):
        super().__init__("slotted")
        self.code = code


class CountingError(Exception):
    made = 0

    def __init__(self, *args):
        super().__init__(*args)
        type(self).made += 1


class FussyError(Exception):
    """Cannot be made from its args."""

    def __new__(cls, one, two):
        self = super().__new__(cls, one)
        self.two = two
        return self

    def __init__(self, one, two):
        super().__init__(one)


class LoudError(Exception):
    def __str__(self):
        raise RuntimeError("no text today")


class HiddenError(Exception):
    """Says something that stands in no attribute."""

    texts = {}  # noqa: RUF012 - by identity

    def __init__(self, text):
        super().__init__()
        self.texts[id(self)] = text

    def __str__(self):
        return self.texts.get(id(self), "")


class HttpLikeError(OSError):
    """An OSError with a constructor of its own, as those of requests are."""

    def __init__(self, *args, response=None):
        super().__init__(*args)
        self.response = response


def opened():
    """Return what open() raises for a file that is not there."""
    try:
        open("/there/is/none")  # noqa: SIM115, PTH123 - it is never open
    except OSError as exc:
        return exc


class TestLayout:
    @pytest.mark.parametrize("is_error", [False, True])
    def test_round_trip(self, is_error):
        """What was packed is unpacked as it was, and so it is after the codec."""
        record = Record(RECORD.value, 0.25, NOON, 60.0, "id@host", is_error)
        assert unpack(record.pack()) == record
        codec = Codec()
        data = pack_head(1) + codec.encode("k", record.pack())
        assert unpack(codec.decode("k", data).value) == record

    def test_lists_are_read_too(self):
        """JSON makes lists of tuples and, of round numbers, integers."""
        content_type, encoding, data = dumps(Record("x", 1, 2, 3, "m").pack(), "json")
        stored = loads(data, content_type, encoding, accept={content_type})
        assert isinstance(stored, list)
        assert unpack(stored) == Record("x", 1, 2, 3, "m")

    @pytest.mark.parametrize(
        "stored",
        [
            None,
            7,
            "mlcache/1",
            b"mlcache",
            {},
            [],
            (),
            ("mlcache/1",),
            RECORD.pack()[:-1],
            (*RECORD.pack(), 1),
            ("mlcache/2", *RECORD.pack()[1:]),
            ("mlcache/1", "no", 1, 0.1, NOON, 60.0, "m"),
            ("mlcache/1", 1, 1, 0.1, NOON, 60.0, "m"),
            ("mlcache/1", False, 1, None, NOON, 60.0, "m"),
            ("mlcache/1", False, 1, 0.1, "today", 60.0, "m"),
            ("mlcache/1", False, 1, 0.1, NOON, [60.0], "m"),
            ("mlcache/1", False, 1, float("nan"), NOON, 60.0, "m"),
            ("mlcache/1", False, 1, 0.1, float("inf"), 60.0, "m"),
            ("mlcache/1", False, 1, 0.1, NOON, 10**400, "m"),
            ("mlcache/1", False, 1, 0.1, NOON, 60.0, None),
        ],
        ids=lambda stored: repr(stored)[:50],
    )
    def test_what_is_no_record(self, stored):
        """Anything else is None: other releases' layouts, foreign values, fields of another kind."""
        assert unpack(stored) is None

    @given(st.lists(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), max_size=9))
    def test_garbage_never_raises(self, garbage):
        """A list of anything is no record, or one whose numbers are numbers."""
        for stored in (garbage, ["mlcache/1", *garbage]):
            record = unpack(stored)
            assert record is None or record.seconds + record.made_at + record.life < 4e15


class TestErrors:
    @pytest.mark.parametrize(
        "error",
        [
            ValueError(),
            ValueError("a", 1, (2, [3])),
            KeyError("sku"),
            MissingError("a", shop="b"),
            MissingForEverError("a"),
            opened(),
            OSError("plain"),
            HttpLikeError("boom", response=404),
            Exception(datetime(2026, 1, 2, tzinfo=UTC)),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_comes_back_as_it_was(self, error):
        """Type, args, attributes and text are those of the original."""
        error.add_note("seen twice")
        copy = unpack_error(pack_error(error), [Exception])
        assert (type(copy), copy.args, copy.__dict__, str(copy)) == (
            type(error),
            error.args,
            error.__dict__,
            str(error),
        )
        assert getattr(copy, "filename", None) == getattr(error, "filename", None)

    @pytest.mark.parametrize(
        "error",
        [
            SlottedError(7),
            FussyError(1, 2),
            LoudError("x"),
            HiddenError("x"),
            ImportError("no", name="mod"),
            StopIteration(3),
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_what_would_come_back_different_is_not_packed(self, error):
        """Something that stands neither in args nor in ``__dict__`` would be lost: not cached at all."""
        assert pack_error(error) is None

    def test_no_constructor_runs(self):
        """What is stored makes no user code of ``__init__`` run."""
        packed = pack_error(CountingError(1))
        made = CountingError.made
        assert unpack_error(packed, [CountingError]).args == (1,)
        assert CountingError.made == made

    @pytest.mark.parametrize("kinds", [[], [KeyError], [SlottedError, OSError]])
    def test_only_classes_that_are_named(self, kinds):
        """An exception whose class is not under one of *kinds* is unknown, whatever the process has imported."""
        assert unpack_error(pack_error(MissingError("a")), kinds) is None

    def test_a_subclass_of_a_named_class(self):
        """It comes back as itself, not as the class that was named."""
        assert type(unpack_error(pack_error(MissingForEverError("a")), [MissingError])) is MissingForEverError

    @pytest.mark.parametrize(
        "packed",
        [
            None,
            7,
            "text",
            (),
            ("builtins", "ValueError", (), {}, 1),
            ("builtins", "ValueError", None, {}),
            ("builtins", "ValueError", (), None),
            ("builtins", "ValueError", (), [1]),
            ("builtins", "Gone", (), {}),
            ("os", "system", ("true",), {}),
            ([], {}, (), {}),
            ("builtins", "ValueError", 5, {}),
        ],
        ids=repr,
    )
    def test_garbage_is_no_exception(self, packed):
        """What names no class that is here, or cannot be its parts, is None and raises nothing."""
        assert unpack_error(packed, [Exception]) is None

    def test_lists_of_a_foreign_serializer(self):
        """After JSON the args are a tuple again."""
        packed = list(pack_error(MissingError("a")))
        packed[2] = list(packed[2])
        assert unpack_error(packed, [MissingError]).args == ("no a in main",)

    def test_survives_pickle_as_the_original_does(self):
        """Celery ships it on: what came out of the cache can be pickled."""
        copy = unpack_error(pack_error(MissingForEverError("a")), [MissingError])
        assert copy.__reduce_ex__(5)[1:] == MissingForEverError("a").__reduce_ex__(5)[1:]
        plain = unpack_error(pack_error(KeyError("a")), [KeyError])
        assert pickle.loads(pickle.dumps(plain)).args == ("a",)
