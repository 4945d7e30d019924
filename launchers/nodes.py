"""What jobs on SLURM ask for and what its nodes have; refuse at once what could never start."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from launchers.cluster import checked
from launchers.slurm_commands import run_command
from mrpo_lab.cli import near
from mrpo_lab.errors import UserError


@checked
class Resources:
    """What one job asks for. All its processes are on one node."""

    timeout_min: int
    cpus: int
    """CPU cores of each process."""
    mem_gb: float
    """Memory of the job in GB."""
    gpus: int
    """GPUs of the job."""
    tasks: int = 1
    """Processes, which train one run together."""
    up_to_billions: float | None = None
    """For scoring: the largest reference, in billions of parameters, that this is enough for."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpu_type: str | None = None
    """GPU type, as in ``gpu:a100:1``; null takes any type."""


@dataclass(frozen=True)
class Nodes:
    """Nodes of one partition that are alike."""

    partition: str
    is_default: bool
    cpus: int
    """Cores per node."""
    memory_gb: float
    """Memory per node in GB."""
    gpus: dict[str, int]
    """GPUs per node, by type; the key "" is for GPUs without a type."""
    minutes: float
    """The partition's time limit."""


def refuse_impossible(kind: str, wanted: Resources, nodes: Sequence[Nodes]) -> None:
    """Compare what jobs of a ``kind`` ask for with the cluster's ``nodes``.

    Raises:
        UserError: there is no such partition, or none of its nodes has all that is asked for.
    """
    partition, names = wanted.partition, sorted({node.partition for node in nodes})
    if partition is None and not any(node.is_default for node in nodes):
        raise UserError(
            "hydra.launcher.partition: the cluster has no default, give "
            f"hydra.launcher.partition=NAME: {', '.join(names)}"
        )
    asked = str(partition).split(",")
    for name in asked if partition is not None else ():
        if name not in names:
            raise UserError(
                f"hydra.launcher.partition={name}: no such partition{near(name, names)}"
            )
    usable = [n for n in nodes if n.partition in asked or (partition is None and n.is_default)]
    for key, need, has, unit in _demands(wanted, usable):
        if need > has:
            where = usable[0].partition if partition is None else partition
            raise UserError(
                f"hydra.launcher.{kind}: asks for {need:g} {unit} ({key}), but no node of "
                f"partition {where} has more than {has:g}"
            )
    if not any(all(need <= has for _, need, has, _ in _demands(wanted, [n])) for n in usable):
        raise UserError(
            f"hydra.launcher.{kind}: partition {usable[0].partition} has each of cpus, mem_gb and "
            "gpus that it asks for, but no node has all of them"
        )


def _demands(wanted: Resources, nodes: Sequence[Nodes]) -> list[tuple[str, float, float, str]]:
    """List (key, amount asked for, most that one of ``nodes`` has, unit)."""
    kind = wanted.gpu_type
    gpus = [node.gpus.get(kind, 0) if kind else sum(node.gpus.values()) for node in nodes]
    return [
        ("cpus x tasks", wanted.cpus * wanted.tasks, max(n.cpus for n in nodes), "cores"),
        ("mem_gb", wanted.mem_gb, max(n.memory_gb for n in nodes), "GB"),
        ("gpus", wanted.gpus, max(gpus), f"GPUs of type {kind}" if kind else "GPUs"),
        ("timeout_min", wanted.timeout_min, max(n.minutes for n in nodes), "minutes"),
    ]


def read_nodes() -> list[Nodes]:
    """Ask SLURM what nodes it has."""
    shown = run_command("sinfo", "-h", "-e", "-o", "%P|%c|%m|%G|%l")
    return [_parse_nodes(*line.split("|")) for line in shown.splitlines()]


def _parse_nodes(name: str, cpus: str, memory: str, gres: str, limit: str) -> Nodes:
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
    """Convert a time limit as SLURM writes it, ``days-hours:minutes:seconds``, to minutes."""
    if limit in ("infinite", "n/a", "UNLIMITED"):
        return float("inf")
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:  # days-hours, with or without minutes and seconds
        hours, mins, seconds = [*parts, 0, 0][:3]
    else:  # minutes, minutes:seconds or hours:minutes:seconds
        hours, mins, seconds = [0, *parts, 0][:3] if len(parts) < 3 else parts
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60
