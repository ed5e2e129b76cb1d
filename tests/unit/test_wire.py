"""The bytes that processes, releases and Lua agree on: what is ours is read exactly, and nothing raises."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from celery_mlcache.codec import Codec
from celery_mlcache.wire import (
    FORMAT_VERSION,
    HEAD_SIZE,
    KIND_TOMBSTONE,
    KIND_VALUE,
    MAX_STAMP,
    Message,
    is_plain,
    pack_head,
    parse_message,
    parse_order,
    split_value,
)

STAMPS = st.integers(0, MAX_STAMP)
MILLISECONDS = st.integers(0, 2**63)
KEYS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)


@given(stamp=STAMPS, expires=MILLISECONDS, kind=st.sampled_from([KIND_VALUE, KIND_TOMBSTONE]), rest=st.binary())
def test_a_value_is_split_into_what_it_was_packed_from(stamp, expires, kind, rest):
    """Stamp, expiry and kind come back from head and tail."""
    assert split_value(pack_head(stamp, expires, 7) + bytes([kind]) + rest) == (stamp, expires, 7, kind)


@given(data=st.binary(max_size=64))
def test_no_stored_bytes_raise(data):
    """Whatever a foreign client has stored is a value of ours or None."""
    found = split_value(data)
    assert found is None or (data[0] == FORMAT_VERSION and found[0] <= MAX_STAMP)


@pytest.mark.parametrize("data", [b"", b"\x01", pack_head(5, 5)], ids=["empty", "short", "head only"])
def test_truncated_values_are_not_ours(data):
    """A head without a kind is not a value."""
    assert split_value(data) is None


def test_a_value_of_another_version_is_not_ours():
    """A later format is a miss, never a misreading."""
    data = bytes([FORMAT_VERSION + 1]) + pack_head(5, 5)[1:] + b"V"
    assert split_value(data) is None


def test_a_value_with_a_huge_stamp_is_not_ours():
    """Lua counts in doubles: what is above its exact range was never handed out."""
    assert split_value(pack_head(MAX_STAMP, 5) + b"V") is not None
    assert split_value(pack_head(MAX_STAMP + 1, 5) + b"V") is None


def test_the_head_has_the_size_that_lua_skips():
    """prelude.lua's KIND_AT counts from 1."""
    assert HEAD_SIZE == 25


def packed(*lines):
    """Return a message as the scripts write it."""
    return "\n".join(str(line) for line in lines).encode()


@given(
    op=st.sampled_from("WD"),
    stamp=st.integers(1, MAX_STAMP),
    micros=st.integers(0, MAX_STAMP),
    keys=st.lists(KEYS, min_size=1),
)
def test_a_message_is_read_as_it_was_written(op, stamp, micros, keys):
    """Stamp, keys and the server's time come back."""
    assert parse_message(packed(1, op, stamp, micros, *keys)) == Message(
        stamp, tuple(keys), is_flush=False, server_time=micros / 1e6
    )


@pytest.mark.parametrize(("op", "field"), [("T", "tags"), ("P", "prefixes")])
def test_tags_and_prefixes_are_not_keys(op, field):
    """What an invalidation of many names stands where its kind says, and nowhere else."""
    found = parse_message(packed(1, op, 7, 2_000_000, "a", "b"))
    assert found == Message(7, server_time=2.0, **{field: ("a", "b")})


@pytest.mark.parametrize(
    ("counter", "floors", "order"),
    [
        (b"7", b"5 6 6", (7, 5)),
        (b"7", b"5 6 6\n6 user:", (7, 5)),
        (b"7", b"5", (7, 5)),
        (None, None, (0, 0)),
        (b"x", b" 5 6", (0, 0)),
        (b"-7", b"9" * 40 + b" 1", (0, 0)),
        (b"", b"", (0, 0)),
        (7, [b"5"], (0, 0)),
    ],
)
def test_the_order_is_read_or_lost(counter, floors, order):
    """Garbage counts as lost: it is seeded anew then."""
    assert parse_order(counter, floors) == order


def stored(stamp, *tags, kind=KIND_VALUE):
    """Return what is stored under "k"."""
    tail = b"T" if kind == KIND_TOMBSTONE else Codec().encode("k", [1], tags=tags)
    return pack_head(stamp, 9) + tail


# Named: a value holds the time of its making, and a test's name must be the same in every process that collects it.
JUDGED = {
    "tagged before the newest tag": (b"5 7 5", stored(6, "t"), False),
    "untagged": (b"5 7 5", stored(6), True),
    "tagged after it": (b"5 7 5", stored(7, "t"), True),
    "tombstone": (b"5 7 5", stored(6, kind=KIND_TOMBSTONE), True),
    "nothing stored": (b"5 7 5", None, True),
    "garbage stored": (b"5 7 5", b"garbage" * 20, True),
    "cut off": (b"5 7 5", stored(6, "t")[:48], True),
    "no tag since the floor": (b"7 7 7", stored(6, "t"), True),
    "a prefix": (b"5 5 6\n6 user:", None, False),
    "one number": (b"5", None, False),
    "no number": (b"", None, False),
    "no floors": (None, None, False),
    "too many digits": (b"5 " + b"9" * 40 + b" 1", None, False),
    "two numbers": (b"5 7", None, False),
}


@pytest.mark.parametrize(("floors", "value", "expected"), JUDGED.values(), ids=JUDGED)
def test_what_plain_commands_can_judge(floors, value, expected):
    """No prefix that was invalidated, and no tagged value older than the newest invalidation of a tag."""
    assert is_plain(floors, [None, value]) == expected


def test_a_flush_has_no_keys():
    """Everything older is dead."""
    assert parse_message(packed(1, "F", 7, 2_000_000)) == Message(7, (), is_flush=True, server_time=2.0)


@given(data=st.binary(max_size=200))
@example(b"1\nW\n" + b"9" * 5000 + b"\n1\nk")
@example("1\nW\n\u0661\n1\nk".encode())
def test_no_message_raises(data):
    """Whatever arrives on the channel is a message of ours or None."""
    found = parse_message(data)
    assert found is None or 0 < found.stamp <= MAX_STAMP


@given(
    lines=st.lists(st.sampled_from(["1", "2", "W", "D", "F", "0", "-1", "1e3", " 7", "x", "", "٣", "²"]), max_size=6)
)
def test_no_message_of_almost_ours_raises(lines):
    """Nearly right is garbage too, without an exception."""
    found = parse_message(packed(*lines))
    assert found is None or lines[0] == "1"


@pytest.mark.parametrize(
    "lines",
    [
        (2, "W", 1, 1, "k"),
        (1, "X", 1, 1, "k"),
        (1, "W", 0, 1, "k"),
        (1, "W", -1, 1, "k"),
        (1, "W", "", 1, "k"),
        (1, "W", "1.0", 1, "k"),
        (1, "W", MAX_STAMP + 1, 1, "k"),
        (1, "W", "9" * 4301, 1, "k"),
        (1, "W", 1, "9" * 4301, "k"),
        (1, "W", "٣", 1, "k"),
        (1, "W", 1, "", "k"),
        (1, "W", 1, 1),
        (1, "F", 1, 1, "k"),
        (1, "T", 1, 1),
        (1, "P", 1, 1),
        (1, "W", 1),
        (1,),
    ],
    ids=lambda lines: "-".join(str(line)[:8] for line in lines),
)
def test_what_is_not_a_message_is_garbage(lines):
    """Another version, an unknown op, a stamp that none can be, a flush of keys, a write of none."""
    assert parse_message(packed(*lines)) is None


def test_a_message_that_is_no_text_is_garbage():
    """Keys are UTF-8, or it is not ours."""
    assert parse_message(b"1\nW\n1\n1\n\xff") is None
