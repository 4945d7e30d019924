"""Run folders with numbers that were made up, by rules that a test knows; written in milliseconds.

The configuration is a real one, so that what a report reads off it is what it reads off real runs.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from harness import compose

from mrpo_lab import configs

SLUGS = tuple(f"ref-{letter}" for letter in "abcdefg")
CLASSES = {
    "single": "Single",
    "uniform": "Uniform",
    "arwc": "ARWC",
    "vdw": "VDW",
    "vaw": "VAW",
    "swcw": "SWCW",
    "swcw_oh": "SWCWOneHot",
    "tsw": "TSW",
}
POOL, TEST = 700, 100
_base: dict[str, Any] = {}


def config(dataset: str, loss: str, weighting: str, seed: int, **changes: Any) -> dict[str, Any]:
    """``changes``: dotted keys with __ for the dots."""
    if not _base:
        _base.update(configs.check(compose("experiment=quickstart")))
    made = copy.deepcopy(_base)
    made["name"] = "study"
    made["loss"]["combine"]["_target_"] = f"mrpo_lab.objective.losses.{loss}"
    made["weighting"] = {"_target_": f"mrpo_lab.objective.weighting.{CLASSES[weighting]}"}
    made["seed"]["root"] = seed
    made["reference_set"] |= {
        "anchor": SLUGS[0],
        "entries": [{"slug": slug, "path": f"hub/{slug}"} for slug in SLUGS],
    }
    made["dataset"]["train"] = 500
    for key, value in changes.items():
        *path, last = key.split("__")
        node = made
        for part in path:
            node = node[part]
        node[last] = value
    return made


def make_run(
    outputs: Path,
    dataset: str = "town",
    loss: str = "mdpo",
    weighting: str = "vaw",
    seed: int = 0,
    slug: str | None = None,
    gain: float = 0.0,
    steps: int = 20,
    status: str = "finished",
    error: str = "",
    suffix: str = "",
    traceback: str = "",
    slugs: Sequence[str] = SLUGS,
    **changes: Any,
) -> Path:
    """The folder of a run whose test accuracy is 0.6 + ``gain`` in expectation."""
    settings = config(dataset, loss, weighting, seed, **changes)
    settings["reference_set"]["entries"] = [{"slug": s, "path": f"hub/{s}"} for s in slugs]
    settings["reference_set"]["anchor"] = slugs[0]
    if slug is not None:
        settings["weighting"]["slug"] = slug
    cell = f"{loss}-{weighting}-tiny7"
    extra = f"weighting.slug={slug}" if slug else suffix
    folder = (
        outputs / "study" / dataset / "tiny" / cell / (f"s{seed}" + (f"__{extra}" * bool(extra)))
    )
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, *map(ord, cell + (slug or "") + dataset)])
    (folder / "config.yaml").write_text(yaml.dump(settings, Dumper=yaml.CSafeDumper))
    session = {
        "started": f"2026-11-0{1 + seed % 9}T10:00:00+0000",
        "command": ["train.py"],
        "git": {"commit": "c0ffee" * 6, "changed": False},
        "python": "3.11",
        "versions": {"torch": "2.13.0"},
        "host": "node1",
        "cpus": 8,
        "gpus": ["H200", "H200"],
        "processes": 2,
    }
    (folder / "provenance.json").write_text(json.dumps({"sessions": [session]}))
    lines = _lines(rng, weighting, slugs, steps)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if status == "running":
        return folder
    if status != "finished":
        result = {"status": status, "error": error, "steps": steps, "traceback": traceback}
        (folder / "result.json").write_text(json.dumps(result))
        return folder
    pairs = _pairs(seed, dataset, slugs, gain, rng)
    pairs.to_parquet(folder / "test_pairs.parquet")
    accuracies = {s: float((pairs[f"margin/{s}"] > 0).mean()) for s in slugs}
    alpha = np.ones(len(slugs)) / len(slugs) if weighting == "uniform" else _order(len(slugs))
    if slug is not None:
        alpha = np.array([float(s == slug) for s in slugs])
    result = {
        "status": "finished",
        "val/accuracy": float((pairs["margin"] > 0).mean()) - 0.01,
        "test/accuracy": float((pairs["margin"] > 0).mean()),
        "base/val_accuracy": 0.5,
        "base/test_accuracy": 0.51,
        "references": {
            s: {
                "mean_alpha": float(a),
                "val_accuracy": accuracies[s],
                "test_accuracy": accuracies[s],
                "test_mean_abs_margin": float(pairs[f"margin/{s}"].abs().mean()),
            }
            for s, a in zip(slugs, alpha, strict=True)
        },
        "pairs": {"train": settings["dataset"]["train"], "val": 100, "test": TEST},
        "steps": steps,
        "wall_seconds": 1800.0,
        "setup_seconds": 0.0,
        "undecided_pairs": 0,
        "gate": [],
        "counts": {"rows": 1000},
        "samples": [],
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def _order(size: int) -> np.ndarray:
    weights: np.ndarray = np.arange(1.0, size + 1)
    return np.asarray(weights / weights.sum())


def _lines(
    rng: np.random.Generator, weighting: str, slugs: Sequence[str], steps: int
) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = [{"step": 0, "val/accuracy": 0.5, "test/accuracy": 0.51}]
    marks = set(np.linspace(0, steps, 11)[1:].round().astype(int).tolist())
    fixed = _order(len(slugs))
    for step in range(1, steps + 1):
        if weighting in ("arwc", "swcw"):
            alpha = rng.dirichlet(np.full(len(slugs), 5.0))
        elif weighting in ("swcw_oh", "tsw"):
            alpha = np.eye(len(slugs))[rng.integers(len(slugs))]
        else:
            alpha = fixed
        line = {
            "step": step,
            "train/loss": float(rng.uniform(0.4, 0.7)),
            "train/grad_norm": float(rng.uniform(1, 2)),
            "train/lr": 1e-4,
            "train/accuracy_before": float(rng.integers(20, 40) / 50),
            "train/accuracy_after": float(rng.integers(20, 40) / 50),
            "perf/pairs_per_second": 50.0,
            "pair_weight/mean": 0.5,
            "pair_weight/cv": 0.1,
            "pair_weight/ess": 49.0,
            **{f"pair_weight/p{q:02}": 0.3 + q / 250 for q in (5, 25, 50, 75, 95)},
            **{f"alpha/{s}": float(a) for s, a in zip(slugs, alpha, strict=True)},
            **{f"loss_by_reference/{s}": 0.7 for s in slugs},
            "alpha/undecided_pairs": 0.0,
        }
        if weighting == "tsw":
            line |= {
                "bandit/arm": float(alpha.argmax()),
                "bandit/probe_before": float(rng.integers(20, 40) / 50),
                "bandit/probe_after": float(rng.integers(20, 40) / 50),
                **{f"bandit/mean/{s}": float(rng.uniform(0.4, 0.6)) for s in slugs},
            }
        if step in marks:
            line |= {"val/accuracy": float(rng.uniform(0.5, 0.6)), "test/accuracy": 0.55}
        lines.append(line)
    return lines


def _pairs(
    seed: int, dataset: str, slugs: Sequence[str], gain: float, rng: np.random.Generator
) -> pd.DataFrame:
    """Test pairs that depend on the seed alone; references rise in accuracy by their place."""
    pool = np.random.default_rng([len(dataset), 1])
    difficulty = pool.normal(size=POOL)
    drawn = np.random.default_rng([seed, 2]).permutation(POOL)[:TEST]
    margins = {slug: pool.normal(0.15 * k - 0.3, 1.0, POOL)[drawn] for k, slug in enumerate(slugs)}
    margin = np.where(rng.random(TEST) < 0.6 + gain, 1.0, -1.0) * (0.1 + np.abs(difficulty[drawn]))
    tokens = pool.integers(-20, 20, POOL)[drawn]
    return pd.DataFrame(
        {
            "pair": [f"{dataset}{i:05}" for i in drawn],
            "margin_before": difficulty[drawn],
            "margin": margin,
            **{f"margin/{s}": m for s, m in margins.items()},
            **{f"weight/{s}": 1 / (1 + np.exp(margin - m)) for s, m in margins.items()},
            **{f"tokens/{s}": tokens for s in slugs},
        }
    )


def make_study(
    outputs: Path, seeds: int = 3, steps: int = 20, datasets: Sequence[str] = ("town",)
) -> None:
    """A rectangle: seven references alone and seven methods with two losses."""
    for dataset in datasets:
        for seed in range(seeds):
            for k, slug in enumerate(SLUGS):
                make_run(outputs, dataset, "dpo", "single", seed, slug, 0.02 * k, steps)
            for loss in ("mdpo", "mrpo"):
                for weighting in ("uniform", "arwc", "vdw", "vaw", "swcw"):
                    make_run(outputs, dataset, loss, weighting, seed, gain=0.1, steps=steps)
            for weighting in ("swcw_oh", "tsw"):
                make_run(outputs, dataset, "mdpo", weighting, seed, gain=0.1, steps=steps)
