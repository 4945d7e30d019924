"""Train one policy: ``python train.py loss=mdpo weighting=vaw dataset=saferlhf``."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mrpo_lab.cli import fail, run_cli
from mrpo_lab.errors import UserError
from mrpo_lab.runs.naming import run_name

CONF = str(Path(__file__).parent / "conf")


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def train(cfg: DictConfig) -> float:
    """Run one configuration and return its validation accuracy, which an optimizing sweeper reads.

    The test accuracy is not returned: no hyperparameter may be chosen on the test split.
    """
    from mrpo_lab.experiment import run_experiment

    hydra_config = HydraConfig.get()
    overrides = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    assert isinstance(overrides, list)
    try:
        name = run_name(str(cfg.get("name")), hydra_config.runtime.choices, overrides)
        return float(run_experiment(cfg, name)["val/accuracy"])
    except UserError as error:
        fail(str(error))
        if hydra_config.mode == RunMode.RUN:
            raise SystemExit(2) from error
        raise


if __name__ == "__main__":
    run_cli(train)
