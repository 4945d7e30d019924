"""Build a cluster from a launcher's profile, the keys of ``conf/hydra/launcher/*.yaml``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from launchers.cluster import Cluster
from launchers.local import Local
from launchers.slurm import Slurm
from mrpo_lab.errors import UserError

CLUSTERS: dict[str, type[Cluster]] = {"slurm": Slurm, "local": Local}


def build_cluster(profile: Mapping[str, Any]) -> Cluster:
    """Build the cluster that ``profile["cluster"]`` names, with the other keys as its settings.

    Raises:
        UserError: names every key whose value does not fit.
    """
    settings = {key: value for key, value in profile.items() if key != "cluster"}
    try:
        # Checked as JSON, whose objects and arrays count as dataclasses and tuples.
        return TypeAdapter(CLUSTERS[profile["cluster"]]).validate_json(json.dumps(settings))
    except ValidationError as error:
        problems = [
            f"hydra.launcher.{'.'.join(map(str, problem['loc']))}: {problem['msg']}, "
            f"got {problem['input']!r}"
            for problem in error.errors()
        ]
        raise UserError("; ".join(problems)) from error
