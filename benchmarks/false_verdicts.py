"""How often `compare` would say better or worse of two sides that do not differ, by repeats a side.

    python -m benchmarks.false_verdicts [--experiments 1000]

Both sides are drawn from one distribution, so every interval that excludes 1 is a false verdict;
5 % of them are what a 95 % interval promises. Three kinds of noise: normal, one with a long tail,
and one where a fifth of the runs was disturbed and took half as long again. The interval is the one
that `compare` forms. stdout: a table; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import numpy as np

from device_tests.results.intervals import ratio_interval

REPEATS = (3, 4, 5, 6, 8, 10)

Draw = Callable[[np.random.Generator, int], np.ndarray]


def _disturbed(random: np.random.Generator, count: int) -> np.ndarray:
    return random.lognormal(0.0, 0.03, count) * np.where(random.random(count) < 0.2, 1.5, 1.0)


NOISE: dict[str, Draw] = {
    "normal, 5 %": lambda random, count: random.normal(1.0, 0.05, count),
    "lognormal, 15 %": lambda random, count: random.lognormal(0.0, 0.15, count),
    "one in five disturbed": _disturbed,
}


def share_of_false_verdicts(draw: Draw, repeats: int, experiments: int) -> float:
    """Intervals that exclude 1, of `experiments`; always the same."""
    random = np.random.default_rng([repeats, experiments])
    found = 0
    for _ in range(experiments):
        low, high = ratio_interval(draw(random, repeats), draw(random, repeats))
        found += not low <= 1 <= high
    return found / experiments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", type=int, default=1000)
    experiments = parser.parse_args().experiments
    shares = {
        name: [share_of_false_verdicts(draw, count, experiments) for count in REPEATS]
        for name, draw in NOISE.items()
    }
    print(f"{'repeats a side':22}" + "".join(f"{count:>8}" for count in REPEATS))
    for name, row in shares.items():
        print(f"{name:22}" + "".join(f"{100 * share:6.1f} %" for share in row))
    print(json.dumps({"repeats": REPEATS, "experiments": experiments, "false_verdicts": shares}))


if __name__ == "__main__":
    main()
