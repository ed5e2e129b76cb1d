"""The codec under generated values and generated damage."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from celery_mlcache import wire
from celery_mlcache.codec import Codec
from celery_mlcache.errors import CodecError

KEY = "k"
HEAD = wire.pack_head(3)
PLAIN = Codec()
SIGNED = Codec(signing_keys=[b"a"], compression="zlib", compression_threshold=32)
QUICK = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])

zones = st.one_of(
    st.none(),
    st.sampled_from([ZoneInfo("Europe/Berlin"), ZoneInfo("Asia/Kolkata"), ZoneInfo("UTC")]),
    st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(timezone),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(st.characters(), max_size=8),
    st.binary(max_size=8),
    st.datetimes(timezones=zones),
    st.dates(),
    st.times(timezones=zones),
    st.timedeltas(),
    st.decimals(),
    st.uuids(),
    st.complex_numbers(),
)
# A signalling NaN cannot be hashed.
keys = st.recursive(
    scalars.filter(lambda v: not (hasattr(v, "is_snan") and v.is_snan())),
    lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.frozensets(inner, max_size=3)),
    max_leaves=3,
)
values = st.recursive(
    scalars | st.binary(max_size=4).map(bytearray) | st.sets(keys, max_size=3),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(max_size=4), inner, max_size=4),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=12,
)


def canonical(value: Any) -> Any:
    """Return a form that is equal for values equal in every respect we promise, and only for those."""
    name = type(value).__name__
    if isinstance(value, list | tuple):
        return name, [canonical(member) for member in value]
    if isinstance(value, set | frozenset):
        return name, sorted((canonical(member) for member in value), key=repr)
    if isinstance(value, dict):
        return name, [(canonical(key), canonical(member)) for key, member in value.items()]
    return name, repr(value), getattr(value, "fold", 0)


@QUICK
@given(values)
def test_any_supported_value_comes_back(value):
    """Whatever is made of the listed types comes back equal in type, order, sign, zone and fold."""
    for codec in (PLAIN, SIGNED):
        tail = codec.encode(KEY, value)
        assert canonical(codec.decode(KEY, HEAD + tail).value) == canonical(value)
        kept, thaw = codec.shelve(KEY, value, tail)
        assert canonical(kept if thaw is None else thaw(kept)) == canonical(value)


@QUICK
@given(values, st.data())
def test_damage_is_a_codec_error(value, data):
    """Bytes changed at random after the stamp never raise anything but CodecError, and never pass."""
    for codec in (PLAIN, SIGNED):
        sound = HEAD + codec.encode(KEY, [value])
        broken = bytearray(sound)
        for _ in range(data.draw(st.integers(1, 4))):
            broken[data.draw(st.integers(len(HEAD), len(sound) - 1))] = data.draw(st.integers(0, 255))
        if broken == sound:
            continue
        try:
            codec.decode(KEY, bytes(broken))
        except CodecError:
            continue
        raise AssertionError(broken)


@QUICK
@given(st.binary(max_size=200), st.booleans())
def test_noise_is_a_codec_error(noise, has_head):
    """Bytes from nowhere are a CodecError."""
    for codec in (PLAIN, SIGNED):
        try:
            codec.decode(KEY, HEAD + noise if has_head else noise)
        except CodecError:
            continue
        raise AssertionError(noise)


@QUICK
@given(
    st.binary(max_size=60) | values.map(lambda v: PLAIN.encode(KEY, [v])[24:]), st.integers(0, 60), st.integers(0, 255)
)
def test_noise_under_a_right_signature_is_a_value_or_a_codec_error(body, at, byte):
    """A body that passes every check of the envelope but is not msgpack of ours raises nothing but CodecError."""
    changed = body[:at] + bytes([byte]) + body[at + 1 :]
    marks = (wire.KIND_VALUE, 0, 1)
    tail = PLAIN._seal(KEY.encode(), marks, (b"", ()), changed)
    with suppress(CodecError):
        PLAIN.decode(KEY, HEAD + tail)
