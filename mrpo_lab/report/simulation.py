"""How often the report's tests err, by simulation: ``python -m mrpo_lab.report.simulation``.

Seeds draw their test pairs from one pool, so that test sets overlap as in the protocol. The table
is in docs/report.md.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mrpo_lab.report.statistics import crossed_t, resampled_t, sign_flip_p

DIFFERING = 0.2
"""Share of the pairs that only one of two methods ranks correctly, if both are equally good."""
OWN = 0.5
"""Share of the variance of a pair's latent difference that is the pair's own in all seeds."""
PROMPTS = 0.5
"""Share of the variance within a seed that pairs of one prompt have in common."""
EFFECT = 0.03
"""True difference in accuracy behind the coverage of intervals."""
LEVEL = 0.05


@dataclass(frozen=True)
class Setting:
    """A study of two methods, run with several seeds."""

    seeds: int
    noise: float
    """Standard deviation over seeds of the true difference in accuracy: training noise."""
    pool: int = 7000
    test: int = 1000
    per_prompt: int = 1
    """Pairs of one prompt, all of them in one split."""

    @property
    def label(self) -> str:
        noise = f"{100 * self.noise:.0f} points" if self.noise else "none"
        return f"{self.seeds} | {noise} | {self.per_prompt}"


def simulate(setting: Setting, effect: float, rng: np.random.Generator) -> np.ndarray:
    """Draw one study: correct under a method minus correct under its baseline.

    A latent normal difference has parts for the prompt, for the pair in all seeds, and for the pair
    in each seed; the method alone is right where it is large, the baseline alone where it is small.

    Returns:
        Differences (pool, seeds), NaN where a seed does not test a pair.
    """
    pool, seeds = setting.pool, setting.seeds
    prompt = np.arange(pool) // setting.per_prompt
    own = rng.normal(size=(pool, 1))
    again = rng.normal(size=(pool, seeds))
    if setting.per_prompt > 1:
        shared = rng.normal(size=(prompt[-1] + 1, 1))[prompt]
        own = math.sqrt(PROMPTS) * shared + math.sqrt(1 - PROMPTS) * own
    latent = math.sqrt(OWN) * own + math.sqrt(1 - OWN) * again
    true = effect + setting.noise * rng.normal(size=seeds)
    shifts = np.linspace(-1, 1, 401)
    bound = stats.norm.isf(DIFFERING / 2)
    accuracies = stats.norm.cdf(shifts - bound) - stats.norm.cdf(-shifts - bound)
    latent += np.interp(true, accuracies, shifts)
    differences = np.where(latent > bound, 1.0, np.where(latent < -bound, -1.0, 0.0))
    for seed in range(seeds):
        order = rng.permutation(prompt[-1] + 1)[prompt]  # pairs of a prompt share their place
        differences[order >= setting.test / setting.per_prompt, seed] = np.nan
    return differences


def errors(setting: Setting, studies: int, rng: np.random.Generator) -> dict[str, float]:
    """Rates over simulated studies.

    Returns:
        ``p``, ``p (pairs)`` and ``p (seeds)``: how often each is below 0.05 though the methods do
        not differ. ``single pairs``: the same for ``p (pairs)`` if pairs of a prompt are taken as
        independent. ``test/train``: the same for ``p (seeds)`` with the ratio of test to training
        pairs if 5 % of the pool are trained on, in place of test / (pool - test). ``coverage``:
        how often the 95 % interval contains a true difference of ``EFFECT``. ``power``: how often
        p finds it.
    """
    names = "p", "p (pairs)", "single pairs", "p (seeds)", "test/train", "coverage", "power"
    found: dict[str, list[bool]] = {name: [] for name in names}
    clusters = np.arange(setting.pool) // setting.per_prompt
    for _ in range(studies):
        null = simulate(setting, 0.0, rng)
        tested = np.isfinite(null).any(1)
        by_seed = np.nanmean(null, axis=0).tolist()
        by_pair = np.nansum(null, axis=1).astype(int)
        by_prompt = np.bincount(clusters, weights=by_pair).round().astype(int)
        others = setting.test / (setting.pool - setting.test)
        trained = setting.test / (0.05 * setting.pool)
        found["p"].append(crossed_t(null[tested], clusters[tested]).p < LEVEL)
        found["p (pairs)"].append(sign_flip_p(by_prompt) < LEVEL)
        found["single pairs"].append(sign_flip_p(by_pair) < LEVEL)
        found["p (seeds)"].append(resampled_t(by_seed, others).p < LEVEL)
        found["test/train"].append(resampled_t(by_seed, trained).p < LEVEL)
        other = simulate(setting, EFFECT, rng)
        tested = np.isfinite(other).any(1)
        test = crossed_t(other[tested], clusters[tested])
        low, high = test.interval()
        found["coverage"].append(low <= EFFECT <= high)
        found["power"].append(test.p < LEVEL)
    return {name: float(np.mean(rates)) for name, rates in found.items()}


SETTINGS = [
    *(Setting(seeds, noise) for seeds in (3, 5) for noise in (0.0, 0.02)),
    *(Setting(seeds, noise, per_prompt=4) for seeds in (3, 5) for noise in (0.0, 0.02)),
]


def main(arguments: Sequence[str]) -> int:
    """Print the table of docs/report.md; the numbers depend on ``--studies`` alone."""
    parser = argparse.ArgumentParser(prog="python -m mrpo_lab.report.simulation")
    parser.add_argument("--studies", type=int, default=2000, help="in each setting; default: 2000")
    studies = parser.parse_args(arguments).studies
    for number, setting in enumerate(SETTINGS):
        rates = errors(setting, studies, np.random.default_rng([858, number]))
        if number == 0:
            names = ["seeds", "training noise", "pairs per prompt", *rates]
            print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")
        shown = " | ".join(f"{rate:.3f}" for rate in rates.values())
        print(f"| {setting.label} | {shown} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
