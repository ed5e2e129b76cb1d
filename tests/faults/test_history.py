"""The laboratory's short form: rounds of mixed faults with fixed seeds, and mutants that it must not let pass.

The long form is ``make faults``. What the checker concludes from which history is in tests/unit/test_laws.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.faults import nemesis
from tests.faults.laboratory import HABITS, MUTANT_PLANS, Plan, run_mutant, run_round
from tests.faults.nemesis import Mood, schedule
from tests.support import laws, mutants

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
