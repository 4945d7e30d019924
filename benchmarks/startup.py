"""How long a run takes to its first step: ``python -m benchmarks.startup OVERRIDE ...``.

Runs what ``train.py OVERRIDE ...`` would, stops where all is ready for the first step (and for the
base model's evaluation, which comes before it), and prints one line of JSON: all seconds since
``$BEGAN`` (of ``time.monotonic``), among them those of importing torch and transformers (with what
it imports to load a model), of loading weights and of reading reference scores; and how many models
were loaded.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from contextlib import suppress
from unittest import mock


class ReadyError(Exception):
    """Computing is about to begin."""


def stop(*_: object) -> None:
    raise ReadyError


def main() -> None:
    began = time.monotonic()
    for library in ("torch", "transformers", "transformers.modeling_utils"):
        importlib.import_module(library)
    imported = time.monotonic() - began
    from benchmarks.ours import Clock, compose
    from mrpo_lab.experiment import run_experiment
    from mrpo_lab.models.references import ReferenceSet
    from mrpo_lab.models.weights import ModelSource
    from mrpo_lab.training.trainer import Trainer

    clock = Clock()
    clock.watch(ModelSource, "load")
    clock.watch(ReferenceSet, "scores")
    with mock.patch.object(Trainer, "fit", stop), suppress(ReadyError):
        run_experiment(compose(sys.argv[1:]), "start")
    total = time.monotonic() - float(os.environ["BEGAN"])
    print(
        json.dumps(
            {"total": total, "import": imported, "models": clock.calls["load"], **clock.seconds}
        )
    )


if __name__ == "__main__":
    main()
