"""Train one policy: ``python train.py loss=mdpo weighting=vaw dataset=saferlhf``."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mrpo_lab.command import run_cli
from mrpo_lab.runs.naming import run_name

CONF = Path(__file__).parent / "conf"


def train(cfg: DictConfig) -> float:
    """Run one configuration and return its validation accuracy, which an optimizing sweeper reads.

    The test accuracy is not returned: no hyperparameter may be chosen on the test split.
    """
    from mrpo_lab.experiment import run_experiment

    hydra_config = HydraConfig.get()
    overrides = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    assert isinstance(overrides, list)
    name = run_name(str(cfg.get("name")), hydra_config.runtime.choices, overrides)
    return float(run_experiment(cfg, name)["val/accuracy"])


if __name__ == "__main__":
    run_cli(train, CONF)
