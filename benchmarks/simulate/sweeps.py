"""The cost of all runs of a sweep, composed as a dispatch composes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from benchmarks.ours import CONF
from benchmarks.simulate.costs import Card, Cards, Model, Range, Work, seconds
from benchmarks.simulate.layouts import Layout, Pass
from benchmarks.simulate.sources import known_profile, prepared_items, profile_items, shape_of
from launchers.composing import Composer
from launchers.grid import expand
from launchers.scores import required_scores
from mrpo_lab import configs
from mrpo_lab.command import explain
from mrpo_lab.composition import open_hydra
from mrpo_lab.data.dataset import SPLITS
from mrpo_lab.data.texts import Replies
from mrpo_lab.errors import UserError
from mrpo_lab.models.references import SHARD_ROWS
from mrpo_lab.scoring.backend import GPU
from mrpo_lab.storage.files import local_path

PADDING = GPU.pad_to_multiple_of
"""How packed rows are padded."""
SAMPLED = 40
"""Number of steps whose mean is the cost of a step."""
SIZES = ("train", "val", "test", "split_by")
"""Keys of ``dataset`` that do not change which pairs are scored by references."""


class Sizes(NamedTuple):
    """Numbers of pairs."""

    train: int
    val: int
    test: int
    pool: int

    def __mul__(self, times: Any) -> Sizes:
        return Sizes(*(times * size for size in self))


@dataclass(frozen=True, eq=False)
class Data:
    """The lengths of a data set's pairs."""

    items: Sequence[Replies]
    """A sample, or all pairs."""
    sizes: Sizes

    @cache  # noqa: B019  runs share their data, which live as long as the program
    def together(self, layout: Layout, count: int, budget: int) -> tuple[list[Pass], float]:
        """The passes in which ``count`` pairs are scored at once, or as many as there are; and how
        often they make ``count``."""
        some = self.items[:count]
        return layout.passes(some, budget, PADDING), count / len(some)

    @cache  # noqa: B019
    def steps(self, layout: Layout, size: int, budget: int) -> list[list[Pass]]:
        """The passes of each of several steps of ``size`` pairs."""
        starts = range(0, max(1, len(self.items) - size + 1), size)
        batches = [self.items[start : start + size] for start in starts[:SAMPLED]]
        return [layout.passes(batch, budget, PADDING) for batch in batches]

    @cache  # noqa: B019
    def shards(self, layout: Layout, budget: int) -> list[Pass]:
        """The passes in which a reference scores all items: the costliest first, shard by shard."""
        order = np.argsort([-layout.cost(item) for item in self.items], kind="stable")
        parts = np.split(order, range(SHARD_ROWS, len(order), SHARD_ROWS))
        shards = ([self.items[i] for i in part] for part in parts)
        return [p for shard in shards for p in layout.passes(shard, budget, PADDING)]


@dataclass(frozen=True)
class Run:
    """The settings of a run that decide its cost, and how many runs have them."""

    config: Mapping[str, Any]
    data: Data
    count: int

    @property
    def model(self) -> Model:
        """The policy."""
        model = self.config["model"]
        eight_bit = "8bit" in str(self.config["optimizer"]["_target_"])
        return Model(
            shape_of(model["path"], True, model["lora"]),
            model["quantization"],
            bool(model["gradient_checkpointing"]),
            2.0 if eight_bit else 8.0,
        )

    def steps(self, sizes: Sizes) -> int:
        train = self.config["train"]
        return -(-sizes.train // int(train["batch_size"])) * int(train["epochs"])

    def step_passes(self, layout: Layout) -> list[list[Pass]]:
        """The passes of each of several steps."""
        train = self.config["train"]
        return self.data.steps(layout, int(train["batch_size"]), int(train["micro_batch_tokens"]))

    def training(self, layout: Layout, sizes: Sizes) -> Work:
        """All optimizer steps."""
        steps, model = self.step_passes(layout), self.model
        return Work.sum(map(model.step, steps)) * (self.steps(sizes) / len(steps))

    def evaluation(self, layout: Layout, sizes: Sizes) -> Work:
        """Evaluations, the accuracy of each batch after its step, and probes."""
        train, weighting = self.config["train"], self.config["weighting"]
        steps, size = self.steps(sizes), int(train["batch_size"])
        evaluations = max(1, min(int(train["evaluations"]), steps))
        scored = [(sizes.val + sizes.test, evaluations + 1.0)]
        if train["accuracy_after_step"]:
            scored.append((size, sizes.train * int(train["epochs"]) / size))
        if str(weighting["_target_"]).endswith(".TSW"):
            probe = int(weighting["probe_size"])
            # Two subsets of val, some pairs in both. An evaluation after the same step does not
            # score them again.
            scored.append((round(probe * (2 - probe / sizes.val)), steps - evaluations))
        work, model = [], self.model
        for pairs, times in scored:
            passes, share = self.data.together(layout, pairs, int(train["token_budget"]))
            work.append(model.score(passes) * (share * times))
        return Work.sum(work)


@dataclass(frozen=True)
class Scoring:
    """The scoring of a data set's pool by one reference."""

    slug: str
    model: Model
    data: Data
    budget: int

    def work(self, layout: Layout, sizes: Sizes) -> Work:
        passes = self.data.shards(layout, self.budget)
        return self.model.score(passes) * (sizes.pool / len(self.data.items))


class Hours(NamedTuple):
    """Favorable and unfavorable GPU-hours of a sweep."""

    training: Range
    evaluation: Range
    references: Range

    @property
    def total(self) -> Range:
        return sum(low for low, _ in self), sum(high for _, high in self)


@dataclass(frozen=True)
class SweepCost:
    """All runs of a sweep, and all scoring that they need; each is done once."""

    runs: Sequence[Run]
    scorings: Sequence[Scoring]

    @classmethod
    def of(cls, overrides: Sequence[str]) -> SweepCost:
        """The runs of ``train.py -m OVERRIDES``.

        Raises:
            UserError: a configuration, a data set or a model that cannot be used.
        """
        try:
            grouped, composer = _expanded(overrides)
            settings = [(composer.full_config(run), count) for run, count in grouped.items()]
        except HydraException as error:
            raise UserError(explain(error)) from error
        runs, scorings = [], dict[str, Scoring]()
        for config, count in settings:
            dataset = OmegaConf.to_yaml(OmegaConf.create(config["dataset"]))
            data = _data(dataset, config["model"]["path"])
            runs.append(Run(config, data, count))
            references = config["reference_set"]
            entries = {entry["slug"]: entry for entry in references["entries"]}
            for required in required_scores(config):
                given = {"quantization": references["quantization"], **entries[required.slug]}
                pool = {k: v for k, v in config["dataset"].items() if k not in SIZES}
                model = Model(shape_of(required.path), given["quantization"])
                budget = int(references["token_budget"])
                key = repr((sorted(pool.items()), required.path, sorted(given.items()), budget))
                scorings.setdefault(key, Scoring(required.slug, model, data, budget))
        return cls(runs, list(scorings.values()))

    @property
    def count(self) -> int:
        return sum(run.count for run in self.runs)

    def hours(self, layout: Layout, card: Card, cards: Cards, times: int = 1) -> Hours:
        """GPU-hours with ``times`` as many pairs in the pool and in every split."""

        def hours(parts: Iterable[tuple[Work, int]]) -> Range:
            spent = [(seconds(work, card, cards.assumed), count) for work, count in parts]
            low, high = (sum(s[i] * count for s, count in spent) / 3600 for i in (0, 1))
            return low, high

        runs = [(run, run.data.sizes * times, run.count) for run in self.runs]
        return Hours(
            hours((run.training(layout, sizes), count) for run, sizes, count in runs),
            hours((run.evaluation(layout, sizes), count) for run, sizes, count in runs),
            hours((s.work(layout, s.data.sizes * times), 1) for s in self.scorings),
        )

    def too_large(self, layout: Layout, card: Card, cards: Cards) -> list[str]:
        """What does not fit the card's memory, even in the favorable case."""
        room = (card.memory_gib - cards.assumed.reserved_gib[0]) * 2**30
        found = set()
        for run in self.runs:
            largest = [p for step in run.step_passes(layout) for p in step]
            if sum(run.model.memory(largest, training=True)) > room:
                found.add("training")
        for s in self.scorings:
            shards = s.data.shards(layout, s.budget)
            if sum(s.model.memory(shards, training=False)) > room:
                found.add(s.slug)
        return sorted(found)


def _expanded(overrides: Sequence[str]) -> tuple[Counter[tuple[str, ...]], Composer]:
    """The overrides of all runs, those that differ in their seed counted together."""
    hydra = open_hydra(CONF)
    chosen = [override for override in overrides if override.startswith("sweep=")]
    master = hydra.compose_config("config", chosen, RunMode.RUN)
    runs = expand(master.hydra.sweeper.get("grids", {}), overrides, hydra.config_loader)
    grouped = Counter(tuple(key for key in run if not key.startswith("seed=")) for run in runs)
    return grouped, Composer(hydra.config_loader, master)


@cache
def _data(dataset: str, model: str) -> Data:
    """The lengths of a data set, whose configuration is given as YAML."""
    config = OmegaConf.create({"dataset": OmegaConf.create(dataset)})
    path = config.dataset.get("path")
    built = configs.build(config, "dataset")
    if "List" in type(built).__name__ and config.dataset.pairs is None:
        raise UserError("dataset: lists are not simulated: pairs only, as with dataset.pairs")
    profile = known_profile(str(path))
    if profile is None:
        if path is not None and not local_path(path).exists():
            raise UserError(f"dataset.path: {path}: there is no such file, and no profile of it")
        prepared, items = prepared_items(built, model)
        train, val, test = (len(prepared.splits[name]) for name in SPLITS)
        sizes = Sizes(train, val, test, len(prepared.items))
        return Data(items, sizes)
    if built.pool is None:
        raise UserError(f"dataset.pool: give a number of pairs: {path} is not read")
    train, val, test, _ = built._sizes(built.pool)
    return Data(profile_items(profile), Sizes(train, val, test, built.pool))
