"""``python -m benchmarks.overhead [FILE]``: time that a run spends outside its training steps.

Needs no other program. FILE has preference pairs; targets are the project's own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.ours import Clock, compose, trainer_of
from benchmarks.results import Result, report
from benchmarks.workload import BETA, Workload, measure
from mrpo_lab.data.reading import read_rows
from mrpo_lab.data.rows import parse_item
from mrpo_lab.data.texts import Item, TokenRow
from mrpo_lab.data.tokenization import Tokenization
from mrpo_lab.experiment import Experiment
from mrpo_lab.models.gate import SAMPLE, Measured
from mrpo_lab.models.policy import Policy
from mrpo_lab.models.references import SHARD_ROWS, ReferenceSet
from mrpo_lab.objective.losses import PreferenceLoss, ctro, logistic, mrpo
from mrpo_lab.objective.scores import Scores, chosen_first
from mrpo_lab.objective.weighting import ARWC, SWCW, TSW, Context, Weighting
from mrpo_lab.progress import quiet_libraries
from mrpo_lab.storage import cache
from mrpo_lab.storage.files import path_argument
from mrpo_lab.training.config import TrainConfig
from mrpo_lab.training.workers import Workers

ROOT = Path(__file__).parents[1]
REFERENCES = 64
DEAREST = PreferenceLoss(
    combine=mrpo, link=logistic, clip=lambda refs: ctro(refs, epsilon=0.1, adaptive=True), beta=BETA
)
WEIGHTINGS: dict[str, Callable[[], Weighting]] = {
    "arwc": ARWC,
    "swcw, window 10": lambda: SWCW(10),
    "tsw without its probe": lambda: TSW(probe_size=1),
}
IMPORTS = """
import sys, time
import {}
assert "torch" not in sys.modules
print(time.monotonic())
"""


def made_up_scores(pairs: int, references: int) -> Scores:
    """Random scores (pairs, references, 2) of about -2 nats per token, no two of them equal."""
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(rng.integers(10, 200, (pairs, references, 2)))
    return Scores(-counts * torch.from_numpy(rng.uniform(1.5, 2.5, counts.shape)), counts)


# --- 64 references instead of one -----------------------------------------------------------------


def many_references(work: Workload) -> Iterator[Result]:
    """Extra time of a step with 64 references, in percent of a real step with one."""
    for batch in (work.batch, 50):
        numbers = measure("ours_training", 1024, replace(work, batch=batch))
        step = statistics.median(numbers["seconds"])
        for name, weighting in WEIGHTINGS.items():
            few, many = small_steps(weighting, batch)
            yield Result(
                f"{name}, {REFERENCES} references instead of 1, {batch} pairs: "
                f"{1e3 * (many - few):.1f} ms of a step of {step:.2f} s",
                100 * (many - few) / step,
                "%",
                at_most=1,
            )


def small_steps(weighting: Callable[[], Weighting], batch: int, steps: int = 30) -> list[float]:
    """Median seconds of a step of a tiny model, with 1 and with ``REFERENCES`` references.

    Both are measured in turn. A pass has four pairs, about as many as a real model's.
    """
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=16,
    )
    policy = Policy(LlamaForCausalLM(config), Tokenization("none", Path()))
    replies = tuple(TokenRow(np.arange(first, first + 6), 3) for first in (0, 1))
    pairs = np.arange(batch)
    numbers = TrainConfig(batch_size=batch, micro_batch_tokens=48, accuracy_after_step=False)
    seconds: dict[int, list[float]] = {1: [], REFERENCES: []}
    for _ in range(3):
        for references, times in seconds.items():
            refs = made_up_scores(batch, references)
            with trainer_of(
                policy, [replies] * batch, refs, numbers, weighting(), DEAREST
            ) as trainer:
                trainer.recorder.run.folder.mkdir(exist_ok=True)
                trainer.weighting.start(no_probe(trainer.data.slugs, refs))
                for _ in range(steps):
                    began = time.perf_counter()
                    trainer.recorder.log(trainer.state.step, trainer.train_step(pairs))
                    times.append(time.perf_counter() - began)
    return [statistics.median(times) for times in seconds.values()]


def no_probe(slugs: list[str], val: Scores) -> Context:
    """A context whose probe returns random accuracies at once."""
    rng = np.random.default_rng(0)
    return Context(
        slugs, val, chosen_first(len(val)), lambda *subsets: rng.random(len(subsets)).tolist(), rng
    )


# --- A trial of the protocol ----------------------------------------------------------------------


def trial(work: Workload, scale: int, weighting: str) -> Iterator[Result]:
    """Shares of a trial's time, with all numbers of pairs of the protocol divided by ``scale``.

    The protocol has 5,000 pairs in 100 steps of 50, 1,000 validation and 1,000 test pairs, ten
    evaluations, the accuracy on each batch after its step, and probes of 250 pairs.
    """
    train, held_out, batch = 5000 // scale, 1000 // scale, 50 // scale
    _, rows = replace(work, batch=1, steps=train // 2).pairs()
    rows = list(itertools.islice(itertools.cycle(rows), train + 2 * held_out))
    policy = work.policy().build(Workers.start().device, 0)
    config = TrainConfig(batch_size=batch, micro_batch_tokens=1024, token_budget=2048)
    chosen = TSW(probe_size=250 // scale) if weighting == "tsw" else ARWC()
    refs = made_up_scores(len(rows), 7)
    clock = Clock()
    with trainer_of(policy, rows, refs, config, chosen, splits=(held_out, held_out)) as trainer:
        clock.watch(trainer, "backward_batch")
        clock.watch(trainer, "gradient_norm")
        clock.watch(trainer.optimizer, "step")
        clock.watch(trainer, "evaluate")
        clock.watch(trainer.policy.scorer, "score")
        began = time.perf_counter()
        trainer.fit()
        total = time.perf_counter() - began
    seconds = clock.seconds
    training = seconds["backward_batch"] + seconds["gradient_norm"] + seconds["step"]
    name = f"{weighting} trial, a {scale}th of the protocol, {total:.0f} s"
    limit = 75 if weighting == "tsw" else 40
    yield Result(f"{name}: outside training", 100 * (1 - training / total), "%", at_most=limit)
    yield Result(f"{name}: of it evaluations", 100 * seconds["evaluate"] / total, "%")
    other = seconds["score"] - seconds["evaluate"]
    yield Result(f"{name}: of it accuracy after steps and probes", 100 * other / total, "%")
    rest = total - training - seconds["score"]
    yield Result(f"{name}: of it neither training nor scoring", 100 * rest / total, "%")


# --- Starting -------------------------------------------------------------------------------------


def imports() -> Iterator[Result]:
    """Seconds from the start of Python until modules that need no torch are imported."""
    for module in ("mrpo_lab", "train"):
        seconds = []
        for _ in range(5):
            began = time.monotonic()
            ended = child(["-c", IMPORTS.format(module)])
            seconds.append(float(ended) - began)
        what = f"starting Python and importing {module}, no torch"
        yield Result(what, statistics.median(seconds), "s", at_most=0.5)


def start(work: Workload, pool: int = 7000) -> Iterator[Result]:
    """Seconds until the first step, with a pool of ``pool`` pairs (the protocol's 7,000 are drawn
    from 27,000 rows) and their scores under seven references in the store."""
    with tempfile.TemporaryDirectory() as folder:
        data, outputs = Path(folder) / "pairs.jsonl", Path(folder) / "outputs"
        write_pairs(work.data, data, rows=27 * pool // 7)
        models = cache.root().resolve() / "models"
        (Path(folder) / "models").symlink_to(models)
        overrides = [
            *("dataset=saferlhf", "reference_set=tiny7", "model=smollm2", "tracker=local"),
            f"model.path={work.model}",
            f"dataset.path={data}",
            *(f"dataset.{name}={size}" for name, size in protocol(pool).items()),
            f"outputs={outputs}",
        ]
        with mock.patch.dict(os.environ, MRPO_LAB_CACHE=folder):
            experiment = Experiment.build(compose(overrides), Workers.start())
            prepared = experiment.prepare()
            fill(experiment.references, prepared.items, prepared.ids)
            found = json.loads(
                child(["-m", "benchmarks.startup", *overrides], BEGAN=str(time.monotonic()))
            )
    own = found["total"] - found["import"] - found["read"]
    what = "from python train.py to the first step, beyond torch, transformers and weights"
    yield Result(what, own, "s", at_most=8)
    assert found["models"] == 1, "only the policy"
    what = f"of it 7 × {pool:,} stored scores, no model loaded"
    yield Result(what, found["scores"], "s", at_most=1)


def protocol(pool: int) -> dict[str, int]:
    return {"pool": pool, "train": 5 * pool // 7, "val": pool // 7, "test": pool // 7}


def write_pairs(source: str, target: Path, rows: int) -> None:
    """Write ``rows`` pairs: those of ``source`` repeated, each with a number so that all differ."""
    items = [parse_item(row, where) for where, row in read_rows(source)]
    with target.open("w") as file:
        for number, item in zip(range(rows), itertools.cycle(items), strict=False):
            *before, last = item.prompt
            prompt = [*before, {**last, "content": f"{last['content']} ({number})"}]
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in item.replies)
            pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(pair) + "\n")


def fill(references: ReferenceSet, items: Sequence[Item], ids: np.ndarray) -> None:
    """Put random scores of every pair into the store, in shards as scoring writes them."""
    scores = made_up_scores(len(items), len(references.members))
    for k, reference in enumerate(references.members):
        stored = reference.stored()
        for part in np.split(np.arange(len(ids)), range(SHARD_ROWS, len(ids), SHARD_ROWS)):
            sums, counts = scores.sums[part, k], scores.counts[part, k]
            stored.scores.append(ids[part], {"sums": sums.numpy(), "counts": counts.numpy()})
        sample = range(SAMPLE)
        alone, tokens = scores.sums[:SAMPLE, k].flatten(), scores.counts[:SAMPLE, k].flatten()
        vocabulary = np.full(len(alone), 10**6)  # a guess over that many is worse than any score
        made = alone.numpy()
        measured = Measured(made, made, made, made, tokens.numpy(), vocabulary)
        stored.add_measured(ids, sample, measured)


def child(arguments: Sequence[str], **environment: str) -> str:
    """The last line that a new Python process prints.

    Raises:
        SystemExit: the process failed; with its errors.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout.splitlines()[-1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    starter = resources.files("mrpo_lab") / "embedded" / "starter.jsonl"
    parser.add_argument("file", nargs="?", default=str(starter), help="preference pairs")
    parser.add_argument("--model", default="embedded:smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--scale", type=int, default=10, help="of a trial of the protocol")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument(
        "--out", type=path_argument, help="also write all numbers to this JSON file"
    )
    return parser.parse_args()


ROWS: dict[str, Callable[[Workload, int], Iterator[Result]]] = {
    "references": lambda work, _: many_references(work),
    "imports": lambda *_: imports(),
    "start": lambda work, _: start(work),
    "trial": lambda work, scale: trial(work, scale, "arwc"),
    "thompson": lambda work, scale: trial(work, scale, "tsw"),
}


def main() -> None:
    options = arguments()
    quiet_libraries()
    work = Workload(
        data=options.file,
        model=options.model,
        dtype=options.dtype,
        max_tokens=512,
        batch=8,
        steps=2,
        threads=os.cpu_count() or 1,
    )
    chosen = (ROWS[name](work, options.scale) for name in options.rows)
    report(itertools.chain.from_iterable(chosen), options.out, work=vars(work))


if __name__ == "__main__":
    main()
