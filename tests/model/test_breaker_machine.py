"""The breaker against an oracle: any order of calls, reports and time, from three threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from celery_mlcache.breaker import CircuitBreaker

THRESHOLD = 3
RESET = 8.0
CALLERS = st.integers(0, 2)
ROLLS = st.sampled_from([0.0, 0.5])


class Oracle:
    """What the breaker promises, as a history: nothing is kept that follows from it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.run_of_failures = 0
        self.failed_probes = 0
        self.is_open = False
        self.opened_count = 0
        self.quiet_until = 0.0
        self.probe: tuple[int, float] | None = None  # who, since when

    @property
    def state(self) -> str:
        if not self.is_open:
            return "closed"
        return "half-open" if self.probe else "open"

    def allow(self, caller: int) -> bool:
        if not self.is_open:
            return True
        may_go = self.now >= (self.probe[1] + RESET if self.probe else self.quiet_until)
        if may_go:
            self.probe = (caller, self.now)
        return may_go

    def speaks(self, caller: int) -> bool:
        return not self.is_open or (self.probe is not None and self.probe[0] == caller)

    def success(self, caller: int) -> None:
        if self.speaks(caller):
            self.is_open, self.probe = False, None
            self.run_of_failures = self.failed_probes = 0

    def failure(self, caller: int, roll: float) -> None:
        if not self.speaks(caller):
            return
        if self.is_open:
            self.failed_probes += 1
        else:
            self.run_of_failures += 1
            if self.run_of_failures < THRESHOLD:
                return
            self.opened_count += 1
        self.is_open, self.probe = True, None
        self.quiet_until = self.now + RESET * min(8, 2**self.failed_probes) * (1 + 0.1 * (2 * roll - 1))

    def proof_of_life(self) -> None:
        self.quiet_until = self.now


class BreakerMachine(RuleBasedStateMachine):
    """Every caller is a thread of its own, as the breaker knows the probe by its thread."""

    def __init__(self) -> None:
        super().__init__()
        self.oracle = Oracle()
        self.roll = 0.5
        self.told: list[tuple[str, str]] = []
        self.callers = [ThreadPoolExecutor(1) for _ in range(3)]
        self.breaker = CircuitBreaker(
            threshold=THRESHOLD,
            reset=RESET,
            clock=lambda: self.oracle.now,
            jitter=lambda: self.roll,
            on_change=lambda old, new: self.told.append((old, new)),
        )

    def teardown(self) -> None:
        for pool in self.callers:
            pool.shutdown()

    def on(self, caller, call):
        return self.callers[caller].submit(call).result(timeout=10)

    @rule(step=st.sampled_from([0.5, 4.0, 7.0, 8.0, 16.0, 64.0]))
    def pass_time(self, step):
        self.oracle.now += step

    @precondition(lambda self: self.oracle.is_open)
    @rule()
    def reach_the_next_turn(self):
        probe = self.oracle.probe
        turn = probe[1] + RESET if probe else self.oracle.quiet_until
        self.oracle.now = max(self.oracle.now, turn)

    @rule(caller=CALLERS)
    def allow(self, caller):
        before = self.told[:]
        assert self.on(caller, self.breaker.allow) == self.oracle.allow(caller)
        assert len(self.told) - len(before) <= 1

    @rule(caller=CALLERS)
    def success(self, caller):
        self.on(caller, self.breaker.success)
        self.oracle.success(caller)

    @rule(caller=CALLERS, roll=ROLLS)
    def failure(self, caller, roll):
        self.roll = roll
        self.on(caller, self.breaker.failure)
        self.oracle.failure(caller, roll)

    @rule(caller=CALLERS)
    def failures(self, caller):
        for _ in range(THRESHOLD):
            self.failure(caller, 0.5)

    @rule(caller=CALLERS)
    def proof_of_life(self, caller):
        self.on(caller, self.breaker.proof_of_life)
        if self.oracle.state == "open":
            self.oracle.proof_of_life()

    @invariant()
    def agrees(self):
        assert self.breaker.state == self.oracle.state
        assert self.breaker.opened_count == self.oracle.opened_count
        seen = ["closed", *(new for _, new in self.told)]
        assert [old for old, _ in self.told] == seen[:-1]
        assert seen[-1] == self.breaker.state


BreakerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class TestBreaker(BreakerMachine.TestCase):
    """The breaker does what the oracle says, whoever calls, whenever."""
