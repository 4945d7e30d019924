"""Refuse at once what a cluster could never start."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mrpo_lab.cli import near
from mrpo_lab.errors import UserError

if TYPE_CHECKING:
    from launchers.slurm import Resources


@dataclass(frozen=True)
class Nodes:
    """Of one partition, nodes that are alike."""

    partition: str
    is_default: bool
    cpus: int
    memory_gb: float
    gpus: dict[str, int]
    """By type; "" where none is told."""
    minutes: float


def refuse_impossible(kind: str, wanted: Resources, nodes: Sequence[Nodes]) -> None:
    """Compare what jobs of a ``kind`` ask for with the cluster's ``nodes``.

    Raises:
        UserError: no such partition, or none of its nodes has all that.
    """
    partition, names = wanted.partition, sorted({node.partition for node in nodes})
    if partition is None and not any(node.is_default for node in nodes):
        raise UserError(
            "hydra.launcher.partition: the cluster has no default, give "
            f"hydra.launcher.partition=NAME: {', '.join(names)}"
        )
    several = str(partition).split(",")
    for name in several if partition is not None else ():
        if name not in names:
            raise UserError(
                f"hydra.launcher.partition={name}: no such partition{near(name, names)}"
            )
    there = [n for n in nodes if n.partition in several or (partition is None and n.is_default)]
    for key, need, has, unit in _demands(wanted, there):
        if need > has:
            where = there[0].partition if partition is None else partition
            raise UserError(
                f"hydra.launcher.{kind}: asks for {need:g} {unit} ({key}), but no node of "
                f"partition {where} has more than {has:g}"
            )
    if not any(all(d[1] <= d[2] for d in _demands(wanted, [node])) for node in there):
        raise UserError(
            f"hydra.launcher.{kind}: partition {there[0].partition} has each of cpus, mem_gb and "
            "gpus that it asks for, but no node has all of them"
        )


def _demands(wanted: Resources, nodes: Sequence[Nodes]) -> list[tuple[str, float, float, str]]:
    """(key, needed, most that a node has, unit)."""
    kind = wanted.gpu_type
    gpus = [node.gpus.get(kind, 0) if kind else sum(node.gpus.values()) for node in nodes]
    return [
        ("cpus x tasks", wanted.cpus * wanted.tasks, max(n.cpus for n in nodes), "cores"),
        ("mem_gb", wanted.mem_gb, max(n.memory_gb for n in nodes), "GB"),
        ("gpus", wanted.gpus, max(gpus), f"GPUs of type {kind}" if kind else "GPUs"),
        ("timeout_min", wanted.timeout_min, max(n.minutes for n in nodes), "minutes"),
    ]


def read_nodes() -> list[Nodes]:
    from launchers.slurm import slurm_says

    shown = slurm_says("sinfo", "-h", "-e", "-o", "%P|%c|%m|%G|%l")
    return [_nodes(*line.split("|")) for line in shown.splitlines()]


def _nodes(name: str, cpus: str, memory: str, gres: str, limit: str) -> Nodes:
    gpus: dict[str, int] = {}
    for kind, count in re.findall(r"gpu(?::([A-Za-z][\w.-]*))?:(\d+)", gres):
        gpus[kind] = gpus.get(kind, 0) + int(count)
    return Nodes(
        partition=name.rstrip("*"),
        is_default=name.endswith("*"),
        cpus=int(cpus.rstrip("+")),
        memory_gb=int(memory.rstrip("+")) / 1024,
        gpus=gpus,
        minutes=minutes(limit),
    )


def minutes(limit: str) -> float:
    """SLURM's ``days-hours:minutes:seconds``."""
    if limit in ("infinite", "n/a", "UNLIMITED"):
        return float("inf")
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:  # days-hours, with or without the rest
        hours, mins, seconds = [*parts, 0, 0][:3]
    else:  # minutes, or with seconds, or with hours too
        hours, mins, seconds = [0, *parts, 0][:3] if len(parts) < 3 else parts
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60
