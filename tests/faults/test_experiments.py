"""What goes wrong in the usual two-level cache, and how often: never in ours, by experiments that can see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.faults.experiments import EXPERIMENTS, NO_TOKEN_LATE, Experiment, Result
from tests.faults.players import Fleet, Protocol

pytestmark = pytest.mark.redis

BOUND = 0.3  # staleness_bound here, with a heartbeat of a quarter of it; the default of 1 s would only be slower
TRIES = 3  # for the naive protocol to fail, on a machine that others keep busy

Run = Callable[[Experiment, Protocol], Result]


@pytest.fixture(scope="module")
def run(session_redis) -> Iterator[Run]:
    """Run an experiment; those that break nothing share the fleets of this file."""
    fleets: dict[Protocol, Fleet] = {}

    with ExitStack() as stack:

        def run(experiment: Experiment, protocol: Protocol) -> Result:
            if experiment.is_rough:
                return experiment.on(protocol, session_redis, BOUND)
            if protocol not in fleets:
                fleets[protocol] = stack.enter_context(Fleet(protocol, session_redis, bound=BOUND))
            return experiment.run(fleets[protocol])

        yield run


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda each: each.name)
def test_it_never_happens(run, experiment):
    """Not once in all rounds is an answer wrong."""
    result = run(experiment, "ours")
    assert not any(result.wrong.values()), f"{experiment.title}: {result.wrong} of {result.of}"
    assert result.of >= 50


@pytest.mark.parametrize("experiment", [each for each in EXPERIMENTS if not each.is_luck], ids=lambda each: each.name)
def test_the_same_experiment_sees_it_in_the_usual_cache(run, experiment):
    """Each thing that could be wrong is wrong in the naive protocol: what finds nothing in ours can find it."""
    results = []
    for _ in range(TRIES):
        results.append(run(experiment, "naive"))
        if all(results[-1].wrong.values()):
            return
    pytest.fail(f"{experiment.title}: no fault found: {results}")


def test_without_its_token_a_hand_off_reads_the_old_value(run):
    """The token, not luck, makes hand-offs right: the same processes without it read what was replaced."""
    result = run(NO_TOKEN_LATE, "ours")
    assert result.wrong["stale"] > 0, f"{result.wrong} of {result.of}"
