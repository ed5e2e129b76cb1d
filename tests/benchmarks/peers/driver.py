"""The callers' side of one peer: plays every scenario and prints one line of JSON for each.

What may live here: scenarios. Run by the Python of the peer's environment, beside its workers; see ``fleet.py`` for
what may be imported. Every wait is bounded, and a hang is an outcome. A scenario uses names of its own, so what one
leaves behind (a lock, a pending id) does not touch the next. Calls *at once* come from processes of their own, as in
life, and because Celery 4 cannot be called from threads that share a result backend.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from celery import chord, group
from celery.exceptions import TimeoutError as Unanswered
from celery.signals import after_task_publish

warnings.simplefilter("ignore")

import fleet  # noqa: E402 - its imports warn on old versions

PATIENCE = 10.0  # seconds a caller waits for a result
DEAD = 30.0  # seconds a call is repeated after its execution died
CROWD = 20
CALLERS = 4  # processes for calls at once
NAME = "<name>"  # stands for an argument that no other scenario uses
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # task, args, kwargs
Outcome = tuple[str, dict[str, float]]  # the table's cell; figures of which less is better

_published = 0
_numbers = iter(range(1_000_000))


@after_task_publish.connect(weak=False)
def _count(**_: Any) -> None:
    global _published  # noqa: PLW0603 - a signal has no other place
    _published += 1


class Sent:
    """What one caller got when it called, and what it gets when it waits."""

    def __init__(self, send: Callable[[], Any]) -> None:
        self.result: Any = None
        self.refusal = ""
        self._answer: str | None = None
        try:
            self.result = send()
        except Exception as exc:
            self.refusal = type(exc).__name__

    @property
    def id(self) -> str | None:
        """The task id, if there is one."""
        return getattr(self.result, "id", None)

    def answer(self, timeout: float = PATIENCE) -> str:
        """Wait for the result; say in a few words what came."""
        if self._answer is None:
            self._answer = f"{self.refusal} when called" if self.refusal else self._wait(timeout)
        return self._answer

    def is_over(self, first_id: str | None) -> bool:
        """Whether nothing more will come of it: refused, answered, or the same id as that of the dead one."""
        return bool(self.refusal) or self.id in (None, first_id) or bool(self.result.ready())

    def _wait(self, timeout: float) -> str:
        try:
            return _spell(self.result.get(timeout=timeout))
        except Unanswered:
            return f"hangs (no result in {timeout:g} s)"
        except Exception as exc:
            return type(exc).__name__


def _spell(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_spell, value)) + "]"
    return f"value of run {value['run']}" if isinstance(value, dict) else repr(value)


def call(task: Any, *args: Any, **kwargs: Any) -> Sent:
    """Call a task as its users do."""
    return Sent(lambda: task.delay(*args, **kwargs))


def fresh(title: str) -> str:
    """Return an argument that no other scenario uses."""
    return f"{title}-{next(_numbers)}"


def plan(name: str, **steps: Any) -> None:
    """Set what the executions do: ``run1=3`` sleeps, ``each="raise"`` raises."""
    for run, step in steps.items():
        fleet.ledger.hset(f"plan:{name}", run.replace("run", ""), str(step))


def runs(name: str) -> int:
    """Return how often it was executed."""
    return int(fleet.ledger.get(f"runs:{name}") or 0)


def starts(name: str) -> list[tuple[float, int, int]]:
    """Return when, in which process and under which parent each execution began."""
    found = [line.split(":") for line in fleet.ledger.lrange(f"starts:{name}", 0, -1)]
    return [(float(at), int(pid), int(parent)) for at, pid, parent in found]


def until(condition: Callable[[], Any], timeout: float) -> Any:
    """Return the first truthy answer, or the last."""
    deadline = time.time() + timeout
    while not (answer := condition()) and time.time() < deadline:
        time.sleep(0.01)
    return answer


def tally(answers: Sequence[str]) -> str:
    """Count equal answers; more than three different values are only counted."""
    values = {answer for answer in answers if answer.startswith("value")}
    if len(values) > 3:
        answers = [f"a value ({len(values)} different)" if answer in values else answer for answer in answers]
    return ", ".join(f"{count}x {answer}" for answer, count in Counter(answers).most_common())


def at_once(calls: Sequence[Call]) -> tuple[list[str], set[str], int]:
    """Make the calls at the same moment from up to CALLERS processes, each its own without waiting in between.

    Returns what they got, the task ids, and how many messages were sent.
    """
    gate = fresh("gate")
    shares = [share for share in (calls[number::CALLERS] for number in range(CALLERS)) if share]
    callers = []
    for share in shares:
        command = [sys.executable, "-W", "ignore", __file__, "--caller", gate]
        callers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        stream = callers[-1].stdin
        assert stream
        stream.write(pickle.dumps([(task.name, args, kwargs) for task, args, kwargs in share]))
        stream.close()
    until(lambda: fleet.ledger.scard(f"ready:{gate}") == len(shares), 30)
    fleet.ledger.set(gate, 1)
    answers: list[str] = []
    ids: set[str] = set()
    messages = 0
    for caller in callers:
        assert caller.stdout
        found = pickle.loads(caller.stdout.read())
        caller.wait()
        answers += found["answers"]
        ids |= found["ids"]
        messages += found["messages"]
    return answers, ids, messages


def caller(gate: str) -> None:
    """Be one of the processes of :func:`at_once`."""
    calls = pickle.loads(sys.stdin.buffer.read())
    sent = Sent(fleet.bystander.delay)  # connected from here on
    sent.answer()
    fleet.ledger.sadd(f"ready:{gate}", os.getpid())
    before = _published
    until(lambda: fleet.ledger.get(gate), 60)
    made = [call(fleet.app.tasks[name], *args, **kwargs) for name, args, kwargs in calls]
    messages = _published - before
    found = {
        "answers": [each.answer() for each in made],
        "ids": {str(each.id) for each in made if each.id},
        "messages": messages,
    }
    sys.stdout.buffer.write(pickle.dumps(found))
    sys.stdout.buffer.flush()
    os._exit(0)  # nothing that a hanging call left behind may hold it up


def both_ways(title: str, calls: Sequence[Call]) -> Outcome:
    """Make the calls at once, and then others like them one after the other; count executions."""

    def named(value: Any, name: str) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(named(each, name) for each in value)
        return name if value == NAME else value

    def made(name: str) -> list[Call]:
        return [
            (task, named(args, name), {key: named(value, name) for key, value in kwargs.items()})
            for task, args, kwargs in calls
        ]

    def count(name: str) -> int:
        return sum(runs(found[len("runs:") :]) for found in fleet.ledger.scan_iter(f"runs:{name}*"))

    name = fresh(title)
    for suffix in ("", "-1-2"):
        plan(name + suffix, each=1)
    answers, _, _ = at_once(made(name))
    in_flight = count(name)
    name = fresh(title)
    for task, args, kwargs in made(name):
        answers.append(call(task, *args, **kwargs).answer())
        settle()
    after = count(name)
    text = f"{in_flight} at once, {after} one after the other"
    odd = [answer for answer in answers if not answer.startswith("value")]
    if odd:
        text += f" ({tally(odd)})"
    return text, {"at once": in_flight, "one after the other": after}


def settle() -> None:
    """Let a worker finish what it does after the result is stored: the peers give their locks back only then."""
    time.sleep(0.5)


# --- scenarios ------------------------------------------------------------------------------------------------------


def twice() -> Outcome:
    """The same call half a second after the first was answered."""
    name = fresh("twice")
    first = call(fleet.work, x=name)
    first.answer()
    settle()
    second = call(fleet.work, x=name)
    answer, count = second.answer(), runs(name)
    if count > 1:
        return f"executed again: {answer}", {"executions": count}
    is_same = ", the first's task id" if second.id == first.id else ""
    return f"not executed: {answer}{is_same}", {"executions": count}


def right_away() -> Outcome:
    """Calls that are repeated as soon as they were answered; a race in peers that unlock after that."""
    answers = []
    for _ in range(CROWD):
        name = fresh("right-away")
        call(fleet.work, x=name).answer()
        answer = call(fleet.work, x=name).answer()
        answers.append(f"executed again: {answer}" if runs(name) > 1 else f"not executed: {answer}")
    return tally(answers), {}


def crowd() -> Outcome:
    """Many identical calls at once, over two nodes of two processes."""
    name = fresh("crowd")
    plan(name, each=1)
    bystander: list[float] = []

    def meanwhile() -> None:
        until(lambda: starts(name), 30)
        time.sleep(0.1)
        began = time.time()
        Sent(fleet.bystander.delay).answer(30)
        bystander.append(time.time() - began)

    beside = threading.Thread(target=meanwhile)
    beside.start()
    answers, ids, messages = at_once([(fleet.work, (), {"x": name})] * CROWD)
    beside.join()
    text = f"{runs(name)} execution{'s' * (runs(name) > 1)}; {tally(answers)}"
    text += f"; {len(ids)} task id{'s' * (len(ids) != 1)}, {messages} message{'s' * (messages != 1)}"
    text += f"; an unrelated call beside them took {bystander[0]:.1f} s"
    figures = {"executions": runs(name), "messages": messages, "wait of an unrelated call, s": round(bystander[0], 1)}
    return text, figures


def spelling() -> Outcome:
    """f(1), f(x=1), f(1, y=2) where 2 is y's default."""
    calls = [(fleet.work, (NAME,), {}), (fleet.work, (), {"x": NAME}), (fleet.work, (NAME,), {"y": 2})]
    return both_ways("spelling", calls)


def sequence() -> Outcome:
    """A tuple and a list."""
    calls = [(fleet.work, (), {"x": (NAME, 1, 2)}), (fleet.work, (), {"x": [NAME, 1, 2]})]
    return both_ways("sequence", calls)


def ignored() -> Outcome:
    """Two calls that differ in an argument which is to be ignored."""
    calls = [(fleet.partial, (), {"x": NAME, "trace": trace}) for trace in "ab"]
    return both_ways("ignored", calls)


def bind() -> Outcome:
    """A task with bind=True, called twice."""
    return both_ways("bind", [(fleet.bound, (), {"x": NAME})] * 2)


def in_group() -> Outcome:
    """A group of two equal members."""
    name = fresh("group")
    plan(name, each=0.5)
    sent = Sent(lambda: group([fleet.work.s(x=name), fleet.work.s(x=name)]).apply_async())
    return f"{sent.answer()}; {runs(name)} executed", {}


def in_chord() -> Outcome:
    """A chord with two equal members."""
    name = fresh("chord")
    plan(name, each=0.5)
    sent = Sent(lambda: chord([fleet.work.s(x=name), fleet.work.s(x=name)])(fleet.collect.s()))
    return f"{sent.answer()}; {runs(name)} executed", {}


def _until_again(task: Any, name: str, since: float, first: Sent) -> Outcome:
    """Repeat a call whose execution died until it is executed again: at once where it is refused, else each 3 s.

    A message may be lost with a node that takes it as it dies, whoever has sent it.
    """
    known, sent, attempts = runs(name), None, 0
    while time.time() - since < DEAD and runs(name) == known:
        if sent is None or sent.is_over(first.id) or time.time() - since > 3 * attempts:
            sent, attempts = call(task, x=name), attempts + 1
        until(lambda: runs(name) > known, 0.5)
    caller = f"first caller: {first.answer()}"
    if runs(name) > known:
        waited = max(0.0, starts(name)[known][0] - since)
        answer = sent.answer() if sent else ""
        return f"executed again after {waited:.1f} s ({answer}); {caller}", {"seconds until again": round(waited, 1)}
    again = sent.answer(1) if sent else ""
    text = f"not within {DEAD:g} s (last of {attempts} calls: {again}); {caller}"
    if fleet.forget:
        fleet.forget(task, {"x": name})
        call(task, x=name).answer()
        text += f"; after {fleet.forget_label}: {'executed' if runs(name) > known else 'still not'}"
    return text, {"seconds until again": DEAD}


def _begin(task: Any, name: str) -> tuple[Sent, int, int]:
    """Make a call that would take a minute; return it, its process and that one's parent as soon as it runs."""
    plan(name, run1=60)
    first = call(task, x=name)
    found = until(lambda: starts(name), 10)
    assert found, "the first call never began"
    return first, found[0][1], found[0][2]


def killed() -> Outcome:
    """The child is killed by SIGKILL during the execution."""
    name = fresh("killed")
    first, pid, _ = _begin(fleet.work, name)
    os.kill(pid, signal.SIGKILL)
    return _until_again(fleet.work, name, time.time(), first)


def limit() -> Outcome:
    """A hard time limit ends the execution."""
    name = fresh("limit")
    first, _, _ = _begin(fleet.limited, name)
    first.answer()
    return _until_again(fleet.limited, name, time.time(), first)


def revoked() -> Outcome:
    """revoke(terminate=True) ends the execution."""
    name = fresh("revoked")
    first, _, _ = _begin(fleet.work, name)
    first.result.revoke(terminate=True)
    return _until_again(fleet.work, name, time.time(), first)


def node_killed() -> Outcome:
    """The whole node is killed by SIGKILL during the execution, as a lost machine; the other one goes on."""
    name = fresh("node-killed")
    first, _, parent = _begin(fleet.work, name)
    os.kill(parent, signal.SIGKILL)
    since = time.time()
    time.sleep(1)  # a message sent at once may still be handed to the dead node's connection, and is lost for an hour
    return _until_again(fleet.work, name, since, first)


def raised() -> Outcome:
    """The task raised; the same call again."""
    name = fresh("raised")
    plan(name, run1="raise")
    first = call(fleet.work, x=name).answer()
    settle()
    second = call(fleet.work, x=name).answer()
    return f"first: {first}; second: {second}", {}


def expired() -> Outcome:
    """The life of the result is over."""
    name = fresh("expired")
    call(fleet.short, x=name).answer()
    settle()
    before = call(fleet.short, x=name).answer()
    count = runs(name)
    time.sleep(fleet.SHORT + 1)
    after = call(fleet.short, x=name).answer()
    return f"within: {before}; after: {after}" if count == 1 else "nothing stored: always executed", {}


def lost() -> Outcome:
    """The result backend no longer has the first call's result (expired, evicted, forgotten)."""
    name = fresh("lost")
    first = call(fleet.work, x=name)
    first.answer()
    settle()
    first.result.forget()
    return f"{call(fleet.work, x=name).answer()}; {runs(name)} executed", {}


def overlong() -> Outcome:
    """An execution of 12 s; the same call after 11 s."""
    name = fresh("overlong")
    plan(name, each=12)
    first = call(fleet.work, x=name)
    time.sleep(11)
    second = call(fleet.work, x=name)
    answers = [first.answer(30), second.answer(30)]
    began = [at for at, *_ in starts(name)]
    is_overlap = len(began) > 1 and began[1] - began[0] < 12
    kind = " at the same time" if is_overlap else ""
    return f"{runs(name)} executed{kind} ({tally(answers)})", {"executions": runs(name)}


def forgotten() -> Outcome:
    """One call's result is to be made anew: is there an API, and does the next call execute?"""
    name = fresh("forgotten")
    for _ in range(2):
        call(fleet.work, x=name).answer()
        settle()
    count = runs(name)
    if fleet.forget is None:
        return ("nothing stored; no API" if count == 2 else "no API"), {}
    if count == 2:
        return f"nothing stored; {fleet.forget_label} frees a lock", {}
    fleet.forget(fleet.work, {"x": name})
    answer = call(fleet.work, x=name).answer()
    return f"{fleet.forget_label}, then: {answer}", {}


def direct() -> Outcome:
    """The task is called as a function after the same call was made through a worker."""
    name = fresh("direct")
    call(fleet.work, x=name).answer()
    try:
        answer = _spell(fleet.work(x=name))
    except Exception as exc:
        answer = type(exc).__name__
    return f"{answer}; {runs(name)} executed", {}


SCENARIOS: dict[str, Callable[[], Outcome]] = {
    scenario.__name__: scenario
    for scenario in (
        twice,
        right_away,
        crowd,
        spelling,
        sequence,
        ignored,
        in_group,
        in_chord,
        bind,
        direct,
        raised,
        expired,
        lost,
        forgotten,
        overlong,
        killed,
        limit,
        revoked,
        node_killed,  # the last one: it leaves one node
    )
}


def main() -> None:
    """Play the scenarios that are named, or all, with a line of JSON each; or be a caller."""
    if sys.argv[1:2] == ["--caller"]:
        caller(sys.argv[2])
    for key in sys.argv[1:] or SCENARIOS:
        Sent(fleet.bystander.delay).answer(30)  # a worker is free again
        try:
            cell, figures = SCENARIOS[key]()
        except Exception as exc:
            cell, figures = f"the scenario failed: {type(exc).__name__}: {exc}", {}
        print(json.dumps({"scenario": key, "cell": cell, "figures": figures}), flush=True)


if __name__ == "__main__":
    main()
