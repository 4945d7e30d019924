"""``python -m benchmarks.gpu``: training and scoring on one GPU, beside TRL and the matmul peak.

Models have the shapes of Qwen2.5-0.5B and Llama 3.1 8B, and random weights. Pairs are random
letters with lengths that resemble those of SafeRLHF and UltraFeedback: no hub, no real data.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from benchmarks.results import Result, report
from benchmarks.synthetic_models import LLAMA_8B, PROFILES, QWEN_HALF_B, Profile, toy, write_model
from benchmarks.workload import Workload, forget_peak, measure
from mrpo_lab.storage.files import path_argument

ROWS = {"lora": None, "qlora": "nf4", "scoring": None}
"""What can be measured, and the quantization of its weights."""
TOKENS = 8192
"""Smallest number of tokens in a pass that is tried; the largest is eight times that."""
TRAINED, EVALUATED = 5000, 11 * 2000
"""Number of pairs that a trial of the protocol trains on, and that its 11 evaluations score."""
LONG = ("logps", "ref_logps", "losses")
"""Long lists in the numbers of a measurement, which are left out of the report."""


@dataclass(frozen=True)
class Bench:
    """The measurements and the folder of their files: in full on a GPU, or at a toy size."""

    folder: Path
    toy: bool
    said: dict[str, Any] = field(default_factory=dict)
    """The numbers of all measurements, by name."""

    def work(self, profile: Profile, config: PreTrainedConfig, batch: int) -> Workload:
        """Steps of ``batch`` pairs with the lengths of ``profile``, for a model of this shape."""
        longest, scale, batch, steps = (64, 0.1, 2, 1) if self.toy else (1024, 1.0, batch, 3)
        model, file = self.folder / config.model_type, self.folder / f"{profile.name}.jsonl"
        if self.toy:
            config = toy(config)
        if not model.exists():
            write_model(config, model, torch.device("cpu" if self.toy else "cuda"))
            forget_peak()  # measurements need the memory
        profile.write(file, batch * (steps + 1), longest, scale)
        return Workload(
            data=str(file),
            model=str(model),
            dtype="bfloat16",
            max_tokens=longest,
            batch=batch,
            steps=steps,
            threads=1 if self.toy else os.cpu_count() or 1,
        )

    def measure(self, what: str, name: str, size: int, work: Workload) -> dict[str, Any]:
        """Run a measurement and keep its numbers under ``what``."""
        numbers = measure(name, size, work)
        kept = {key: value for key, value in numbers.items() if key not in LONG}
        self.said[f"{what}: {name} {size}"] = kept
        return numbers

    def training(self, profile: Profile, row: str) -> Iterator[Result]:
        """Training with the fastest number of tokens in a pass, with or without gradient
        checkpointing, beside TRL with its fastest micro-batch."""
        name = f"{row}, {profile.name}"
        work = self.work(profile, QWEN_HALF_B, profile.batch)
        work = replace(work, quantization=ROWS[row])
        peak = self.measure(name, "peak", 0, work)["flops_per_second"]
        ours = self.measure(name, "ours_best", TOKENS, work)
        checkpointing = "with" if ours["gradient_checkpointing"] else "without"
        best = f"{ours['tokens']:,} tokens a pass, {checkpointing} gradient checkpointing"
        speed, scored = ours["pairs_per_second"], ours["scored_pairs_per_second"]
        yield Result(f"{name}: training, {best}", speed, "pairs/s")
        yield Result(f"{name}: its memory", ours["peak_gib"], "GiB")
        share = 100 * ours["plain_flops_per_second"] / peak
        yield Result(f"{name}: 4 N a token, of {peak / 1e12:.3g} TFLOP/s", share, "%")
        sizes = [size for size in (1, 2, 5, 25) if work.batch % size == 0]
        theirs = [self.measure(name, "trl_training", size, work) for size in sizes]
        fastest = max(trl["pairs_per_second"] for trl in theirs)
        yield Result(f"{name}: TRL at its best micro-batch", fastest, "pairs/s")
        yield Result(f"{name}: beside TRL", speed / fastest, "times")
        minutes = (TRAINED / speed + (EVALUATED + TRAINED) / scored) / 60
        yield Result(f"{name}: a trial, projected", minutes, "min", at_most=profile.minutes)

    def scoring(self, profile: Profile) -> Iterator[Result]:
        """Scoring by a reference of 8B parameters, with the fastest number of tokens in a pass."""
        name = f"scoring 8B, {profile.name}"
        work = self.work(profile, LLAMA_8B, 200)
        peak = self.measure(name, "peak", 0, work)["flops_per_second"]
        ours = [self.measure(name, "ours_scoring", n * TOKENS, work) for n in (1, 2, 4)]
        best = max(ours, key=lambda numbers: float(numbers["pairs_per_second"]))
        share = 100 * best["plain_flops_per_second"] / peak
        yield Result(f"{name}: speed", best["pairs_per_second"], "pairs/s")
        yield Result(f"{name}: 2 N a token, of {peak / 1e12:.3g} TFLOP/s", share, "%", at_least=55)

    def results(self, rows: list[str], profiles: list[str]) -> Iterator[Result]:
        """All results of the chosen rows and profiles."""
        for row in rows:
            for profile in PROFILES:
                if profile.name in profiles:
                    yield from (
                        self.scoring(profile) if row == "scoring" else self.training(profile, row)
                    )


def main(arguments: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    names = [profile.name for profile in PROFILES]
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--profiles", nargs="+", default=names, choices=names)
    parser.add_argument("--toy", action="store_true", help="a small size on the CPU: for its test")
    parser.add_argument(
        "--out", type=path_argument, default=Path("outputs/gpu.json"), help="%(default)s"
    )
    options = parser.parse_args(arguments)
    if not options.toy and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: there is no GPU here")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.toy)
        results = bench.results(options.rows, options.profiles)
        return report(results, options.out, toy=options.toy, said=bench.said)


if __name__ == "__main__":
    main()
