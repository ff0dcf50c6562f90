"""Train the whole zoo unwatched, and print how each went: python -m tests.zoo.survey [name …]."""

import argparse
import sys

import torch

from tests.zoo.case import Faulty
from tests.zoo.catalogue import ALL
from tests.zoo.outcome import Outcome, failed, learned, outcome


def line(name: str, seed: int, told: str, found: Outcome, *, right: bool) -> str:
    """One training in one line."""
    scalars = " ".join(f"{key}={value:.3g}" for key, value in found.scalars.items())
    return (
        f"{'' if right else 'NOT '}{told:8} {name:36} seed {seed}"
        f"  {found.start:9.3g} → {found.end:9.3g}  {found.seconds:4.1f} s  {scalars}"
    )


def main() -> int:
    """Print a line for each training; 1 if one did not go as it should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names; all cases without")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--healthy", action="store_true", help="only these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    for case in ALL:
        if arguments.healthy and isinstance(case, Faulty):
            continue
        if arguments.names and not any(part in case.name for part in arguments.names):
            continue
        for seed in range(arguments.seeds):
            if isinstance(case, Faulty):
                found = outcome(case, seed=seed)
                right = failed(case.name, found)
                print(line(case.name, seed, "failed", found, right=right), flush=True)  # noqa: T201
                wrong += not right
            found = outcome(case, seed=seed, repaired=True)
            right = learned(case.name, found)
            print(line(case.name, seed, "learned", found, right=right), flush=True)  # noqa: T201
            wrong += not right
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
