"""The long form of the laboratory, for ``make faults``: rounds of mixed faults, then every mutant."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

from tests.faults.laboratory import HABITS, Plan, Verdict, run_mutant, run_round
from tests.support import logs, mutants

MUTANT_WITHIN = 60.0  # seconds


def main() -> int:
    """Run it; 1 if any law was broken or any mutant was not caught."""
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of faults, over all rounds (10)")
    parser.add_argument("--seed", type=int, default=1, help="of the first round; the next take the next (1)")
    parser.add_argument("--processes", type=int, default=8, help="that use the cache (8)")
    parser.add_argument("--round", type=float, default=30.0, help="seconds of faults in one round (30)")
    parser.add_argument("--habits", choices=HABITS, help="only these; else each round takes the next")
    parser.add_argument("--mutants", nargs="*", choices=[*mutants.NAMES, "none"], help="only these (all)")
    args = parser.parse_args()
    began = time.monotonic()
    are_well = [_rounds(args), _mutants(args)]
    print(f"{'well' if all(are_well) else 'NOT WELL'}, {(time.monotonic() - began) / 60:.1f} minutes")
    return 0 if all(are_well) else 1


def _rounds(args: argparse.Namespace) -> bool:
    plan = Plan(processes=args.processes, seconds=args.round)
    names = [args.habits] if args.habits else list(HABITS)
    verdicts: list[Verdict] = []
    while sum(verdict.plan.seconds for verdict in verdicts) < args.minutes * 60:
        seed = args.seed + len(verdicts)
        name = names[(seed - 1) % len(names)]
        verdict = run_round(seed, replace(plan, habits=HABITS[name]))
        verdicts.append(verdict)
        print(f"{name:8s} {verdict.summary}", flush=True)
        if verdict.violations:
            print(verdict.text, flush=True)
        logs.delete_finished()
    broken = sum(bool(verdict.violations) for verdict in verdicts)
    minutes = sum(verdict.plan.seconds for verdict in verdicts) / 60
    print(
        f"{len(verdicts)} rounds, {minutes:.1f} minutes of faults, {sum(v.faults for v in verdicts)} faults, "
        f"{sum(v.ops for v in verdicts)} operations: {broken} rounds with violations",
        flush=True,
    )
    return not broken


def _mutants(args: argparse.Namespace) -> bool:
    names = mutants.NAMES if args.mutants is None else [name for name in args.mutants if name != "none"]
    are_caught = []
    for name in names:
        verdict, seconds = run_mutant(name, args.seed)
        is_caught = bool(verdict.violations) and seconds < MUTANT_WITHIN
        laws = ", ".join(sorted({violation.law for violation in verdict.violations}))
        print(f"mutant {name}: {f'caught by {laws}' if is_caught else 'NOT CAUGHT'} ({seconds:.0f} s)", flush=True)
        are_caught.append(is_caught)
        logs.delete_finished()
    return all(are_caught)


if __name__ == "__main__":
    sys.exit(main())
