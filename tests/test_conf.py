"""Every option of every group composes, passes the check, builds, and trains as described."""

import inspect
import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from harness import ROOT, SLUGS, TINY, compose
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object
from omegaconf import OmegaConf

from mrpo_lab import configs
from mrpo_lab.errors import UserError
from mrpo_lab.experiment import Experiment
from mrpo_lab.runs.folder import Run
from mrpo_lab.runs.naming import run_name
from mrpo_lab.training.recorder import Recorder
from mrpo_lab.training.trainer import Trainer
from mrpo_lab.training.workers import Workers

pytest_plugins = ("surroundings",)
pytestmark = pytest.mark.usefixtures("surroundings")

CONF = ROOT / "conf"
REQUIRED = {
    "dataset=jsonl": ["dataset.path=pairs.jsonl"],
    "dataset=jsonl_lists": ["dataset.path=lists.jsonl"],
    "lambda=table": ["lambda.rows=[{a: 1}]"],
    "experiment=trade_off": ["dataset.path=lists.jsonl"],
    "weighting=fixed": ["weighting.weights=[1,2,3]"],
    "reference_set=custom": ["reference_set.entries=[{slug: a, path: a/b}]"],
}
"""Keys that an option requires the user to set."""
SECTIONS = (
    "dataset",
    "reference_set",
    "model",
    "loss",
    "weighting",
    "lambda",
    "seed",
    "optimizer",
    "train",
    "tracker",
)


def options() -> Iterator[str]:
    """``group=option`` of every file below ``conf``."""
    for path in sorted(CONF.rglob("*.yaml")):
        name = path.relative_to(CONF).with_suffix("")
        if name.parts == ("config",):
            continue
        group = name.parts[0] if name.parts[0] == "experiment" else name.parent.as_posix()
        yield f"{group}={name.relative_to(group).as_posix()}"


def named(*overrides: str) -> str:
    """The run that ``train.py OVERRIDES`` would make or find."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra_compose("config", overrides=list(overrides), return_hydra_config=True)
    return run_name(cfg.name, cfg.hydra.runtime.choices, cfg.hydra.overrides.task)


@pytest.mark.parametrize("option", list(options()))
def test_option_composes_is_right_and_builds(option: str) -> None:
    cfg = compose(option, *REQUIRED.get(option, ()))
    configs.check(cfg)
    for key in SECTIONS:
        configs.build(cfg, key)
    if option in REQUIRED:  # without it, the message says what to give
        with pytest.raises(UserError, match="required") as refused:
            configs.check(compose(option))
        (key, _) = REQUIRED[option][0].split("=", 1)
        assert f"give {key}=VALUE" in str(refused.value)


@pytest.mark.parametrize(
    "group", ["dataset", "reference_set", "model", "loss", "weighting", "train", "tracker"]
)
def test_file_lists_all_that_may_be_set(group: str) -> None:
    """No default is hidden in code but those of a model's adapter, which may not be set."""
    for path in sorted((CONF / group).glob("*.yaml")):
        node = compose(f"{group}={path.stem}")[group]
        takes = set(inspect.signature(get_object(node["_target_"])).parameters) - {"adapter"}
        assert set(node) - configs.RESERVED == takes, path


PROTOCOL = {  # METHODS.md, the paper's protocol
    "model.path": "Qwen/Qwen2.5-0.5B-Instruct",
    "model.quantization": "nf4",
    "model.dtype": "bfloat16",
    "model.lora.r": 32,
    "model.lora.lora_alpha": 16,
    "model.lora.lora_dropout": 0.0,
    "model.lora.init_lora_weights": "gaussian",
    "model.gradient_checkpointing": True,
    "optimizer.lr": 1e-4,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.weight_decay": 0.01,
    "loss.beta": 0.1,
    "loss.length_normalized": True,
    "train.epochs": 1,
    "train.evaluations": 10,
    "train.accuracy_after_step": True,
    "train.schedule": "constant",
    "train.warmup_steps": 0,
    "train.max_grad_norm": None,
    "dataset.pool": 7000,
    "dataset.pool_seed": 858,
    "dataset.train": 5000,
    "dataset.val": 1000,
    "dataset.test": 1000,
    "dataset.max_tokens": 1024,
    "dataset.min_percentile": 2.5,
    "reference_set.anchor": "qwen2.5-0.5b",
    "reference_set.dtype": "bfloat16",
    "reference_set.quantization": None,
    "weighting.window": 1,
}
PER_DATASET = {"saferlhf": (50, 250), "ultrafeedback": (25, 125)}


@pytest.mark.parametrize("dataset", PER_DATASET)
def test_the_default_is_the_protocol_of_the_paper(dataset: str) -> None:
    cfg = compose(f"dataset={dataset}", "weighting=swcw")
    assert {key: OmegaConf.select(cfg, key) for key in PROTOCOL} == PROTOCOL
    batch_size, probe_size = PER_DATASET[dataset]
    assert cfg.train.batch_size == batch_size
    assert compose(f"dataset={dataset}", "weighting=tsw").weighting.probe_size == probe_size
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(cfg.model.lora.target_modules) == projections
    assert len(cfg.reference_set.entries) == 7
    assert cfg.reference_set.entries[0].path == cfg.model.path


def test_names_of_runs_differ_where_a_number_can() -> None:
    choices = {
        "dataset": ["helpsteer2", "ultrafeedback"],
        "model": ["smollm2", "tiny"],
        "loss": ["mrpo", "geometric", "dpo"],
        "loss/link": ["ipo", "hinge"],
        "loss/clip": ["ctro", "ctro_fixed"],
        "weighting": ["swcw", "swcw_oh"],
        "reference_set": ["tiny7", "solo_yi1_5_9b"],
        "seed": ["s1", "s2"],
        "optimizer": ["adamw8bit"],
        "train": ["small"],
        "loss.beta": ["0.2", "2"],
        "reference_set.use": ["[qwen2.5-0.5b,mistral-7b]", "[qwen2.5-0.5b,qwen3-4b]"],
        "model.lora": ["null"],
        "~optimizer.eps": [""],
        "optimizer.eps": ["1e-6"],
        "name": ["other"],
    }
    singles = [f"{key}={value}" for key, values in choices.items() for value in values]
    doubles = [["loss=mrpo", "loss/link=ipo"], ["loss/link=ipo", "loss.beta=2"]]
    chosen = [[], *([single] for single in singles), *doubles]
    names = [named(*[o.removesuffix("=") if o[0] == "~" else o for o in each]) for each in chosen]
    assert len(set(names)) == len(names), sorted(names)
    for name in names:
        assert all(len(part) < 200 for part in name.split("/"))
        assert name.count("/") == 4


def test_experiments_differ_in_name() -> None:
    experiments = [option for option in options() if option.startswith("experiment=paper/")]
    names = [named(option) for option in experiments]
    assert len(set(names)) == len(names), sorted(names)


def test_name_of_a_run_leaves_out_what_changes_no_number() -> None:
    free = (
        "tracker=local",
        "outputs=elsewhere",
        "train.micro_batch_tokens=1",
        "train.token_budget=99",
        "train.checkpoint_every=3",
        "reference_set.gate=warn",
        "reference_set.token_budget=77",
    )
    assert named(*free) == named()
    assert named("loss.beta=2", *free, "seed=s1") == named("seed=s1", "loss.beta=2")


class World:
    """Pairs, reference scores and one policy that all combinations share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        cfg = compose(*TINY, "protocol.batch_size=3", "optimizer.lr=1e-4")
        workers = Workers(0, 1, torch.device("cpu"))
        self.experiment = Experiment.build(cfg, workers)
        prepared = self.experiment.prepare()
        refs = self.experiment.reference_scores(prepared).scores
        self.data = self.experiment.data(prepared, refs)
        self.policy = self.experiment.model.build(workers.device, seed=0)
        self.initial = {n: p.detach().clone() for n, p in self.policy.trainable.items()}
        self.val = self.margins(self.data.val)

    def margins(self, pairs: np.ndarray) -> oracles.Matrix:
        return [[row[0] - row[1] for row in item] for item in self.logps(pairs)]

    def logps(self, pairs: np.ndarray) -> list[oracles.Matrix]:
        refs = self.data.refs[torch.from_numpy(pairs)]
        logps: list[oracles.Matrix] = (refs.sums / refs.counts).tolist()
        return logps

    def trainer(self, weighting: Any) -> Trainer:
        self.policy.model.load_state_dict(self.initial, strict=False)
        it = self.experiment
        recorder = Recorder(Run(self.folder, "run", {}), it.tracker, {}, active=True)
        trainer = Trainer(
            config=it.config,
            policy=self.policy,
            data=self.data,
            loss=it.loss,
            weighting=weighting,
            sampler=it.sampler,
            optimizer=it.optimizer,
            seeds=it.seeds,
            workers=it.workers,
            recorder=recorder,
        )
        trainer.start()
        return trainer


@pytest.fixture(scope="module")
def world(score_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MRPO_LAB_CACHE", str(score_store))
        yield World(tmp_path_factory.mktemp("world"))


@cache
def loss_of(name: str, link: str, clip: str) -> Any:
    chosen = (f"loss={name}", f"loss/link={link}", f"loss/clip={clip}", f"loss.beta={BETA}")
    return configs.build(compose(*TINY, *chosen), "loss")


def alpha_by_hand(
    weighting: str, world: World, history: list[oracles.Matrix], now: oracles.Matrix, arm: float
) -> oracles.Matrix:
    """The loss per pair, computed from its definition."""
    K = len(SLUGS)  # noqa: N806
    rules = {
        "uniform": lambda: oracles.uniform(K),
        "single": lambda: oracles.single(0, K),
        "fixed": lambda: oracles.fixed([1.0, 2.0, 3.0]),
        "vdw": lambda: oracles.vdw(world.val),
        "vaw": lambda: oracles.vaw(world.val),
        "vsw": lambda: oracles.vsw(world.val),
        "rmc": lambda: oracles.rmc(world.val),
        "grid": lambda: oracles.grid(world.val, 6),
        "swcw": lambda: oracles.swcw(history, 1, K),
        "swcw_oh": lambda: oracles.swcw_oh(history, 0, 1, K),
        "tsw": lambda: oracles.single(int(arm), K),
    }
    if weighting == "arwc":
        return [oracles.arwc(row) for row in now]
    return [rules[weighting]()] * len(now)


def loss_by_hand(
    name: str, policy: oracles.Row, refs: oracles.Matrix, alpha: oracles.Row, **link: Any
) -> float:
    if name == "dpo":
        return oracles.dpo(policy, refs[alpha.index(max(alpha))], BETA, **link)
    return float(getattr(oracles, name)(policy, refs, alpha, BETA, **link))


BETA = 1.0
LOSSES = ("dpo", "mdpo", "mrpo", "geometric")
LINKS = {"logistic": 0.0, "robust": 0.1, "ipo": 0.0, "hinge": 0.0}
CLIPS = {"none": None, "ctro": True, "ctro_fixed": False}
WEIGHTINGS = tuple(path.stem for path in sorted((CONF / "weighting").glob("*.yaml")))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_combination_takes_a_step_on_the_loss_of_the_formula(
    weighting: str, world: World
) -> None:
    option = f"weighting={weighting}"
    cfg = compose(*TINY, option, *REQUIRED.get(option, ()))
    trainer = world.trainer(configs.build(cfg, "weighting"))
    links = itertools.cycle(LINKS)
    history: list[oracles.Matrix] = []
    for step, (name, clip) in enumerate(itertools.product(LOSSES, CLIPS)):
        link = next(links)
        trainer.loss = loss_of(name, link, clip)
        pairs = trainer.batch(step % trainer.steps_per_epoch)
        scores = trainer.evaluation.score(pairs)
        metrics = trainer.train_step(pairs)

        now, how = world.margins(pairs), dict[str, Any](link=link, eps=LINKS[link])
        arm = metrics.get("bandit/arm", 0.0)
        alpha = alpha_by_hand(weighting, world, history, now, arm)
        history.append(now)
        policy: oracles.Matrix = (scores.sums / scores.counts).tolist()
        weights, losses = [], []
        for row, refs, a in zip(policy, world.logps(pairs), alpha, strict=True):
            adaptive = CLIPS[clip]
            near = refs if adaptive is None else oracles.ctro(refs, 0, 0.1, adaptive)

            def loss(row: oracles.Row, near: Any = near, a: Any = a) -> float:
                return loss_by_hand(name, row, near, a, **how)  # noqa: B023

            losses.append(loss(row))
            weights.append(oracles.pair_weight(loss, row, BETA))
        expected: dict[str, Any] = {"train/loss": np.mean(losses)}
        if link != "hinge":  # whose slope jumps between two differences
            expected["pair_weight/mean"] = np.mean(weights)
            expected["pair_weight/ess"] = oracles.ess(weights)
        for k, slug in enumerate(SLUGS):
            expected[f"alpha/{slug}"] = np.mean([a[k] for a in alpha])
            expected[f"loss_by_reference/{slug}"] = np.mean(
                [
                    oracles.dpo(row, refs[k], BETA, **how)
                    for row, refs in zip(policy, world.logps(pairs), strict=True)
                ]
            )
        logged = {key: metrics[key] for key in expected}
        assert logged == pytest.approx(expected, abs=1e-4, rel=1e-4), (name, link, clip)
        assert metrics["train/grad_norm"] > 0 or link == "hinge"
