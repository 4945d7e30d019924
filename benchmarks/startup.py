"""``python -m benchmarks.startup OVERRIDE ...``: how long a run takes until its first step.

Does what ``train.py OVERRIDE ...`` would, stops before the base model's evaluation, which precedes
the first step, and prints one line of JSON: ``total`` seconds since the environment variable
``BEGAN`` (as ``time.monotonic`` counts); among them ``import`` (torch and transformers, with what
it imports to load a model), ``read`` (weights) and ``scores`` (of references); and the number of
``models`` that were loaded.
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
    """The run is about to evaluate its base model."""


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
    clock.watch(ModelSource, "read")
    clock.watch(ReferenceSet, "scores")
    with mock.patch.object(Trainer, "fit", stop), suppress(ReadyError):
        run_experiment(compose(sys.argv[1:]), "start")
    total = time.monotonic() - float(os.environ["BEGAN"])
    print(
        json.dumps(
            {"total": total, "import": imported, "models": clock.calls["read"], **clock.seconds}
        )
    )


if __name__ == "__main__":
    main()
