"""The runs of a sweep: grids of configuration values, narrowed by the command line."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from mrpo_lab.cli import near
from mrpo_lab.errors import UserError

Axes = dict[str, list[str]]
"""A key to the overrides ``key=value`` that it takes one after the other."""


def expand(
    grids: Mapping[str, Mapping[str, str]], arguments: Sequence[str], loader: ConfigLoader
) -> list[list[str]]:
    """List the overrides of every run, each run once.

    A grid maps keys to values in Hydra's syntax, ``a,b``, ``range(1,4)`` or ``glob(solo_*)``; its
    runs are all combinations. An argument for a key that some grid has keeps the runs with the
    values it names; any other argument is one more axis of all grids.

    Raises:
        UserError: an argument names a value that no grid has, or leaves no run.
    """
    asked = parse(arguments, loader)
    if len(asked.get("sweep", ())) > 1:
        raise UserError(f"sweep: one at a time, got {', '.join(asked['sweep'])}")
    all_axes = [parse([f"{k}={v}" for k, v in grid.items()], loader) for grid in grids.values()]
    in_a_grid = {key for axes in all_axes for key in axes}
    narrowing = {key: values for key, values in asked.items() if key in in_a_grid}
    for key, values in narrowing.items():
        _refuse_unknown(key, values, all_axes)
    further = {key: values for key, values in asked.items() if key not in in_a_grid}
    runs: dict[frozenset[str], list[str]] = {}
    for axes in all_axes or [{}]:
        kept = {
            key: [v for v in values if v in narrowing.get(key, values)]
            for key, values in axes.items()
        }
        if narrowing.keys() <= kept.keys():
            for run in itertools.product(*kept.values(), *further.values()):
                runs.setdefault(frozenset(run), list(run))
    if not runs:
        chosen = " ".join(itertools.chain(*narrowing.values()))
        raise UserError(f"no run of the sweep has {chosen} together")
    return list(runs.values())


def parse(overrides: Sequence[str], loader: ConfigLoader) -> Axes:
    """Parse overrides with their lists of values; the last override of a key counts."""
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    return {override.get_key_element(): _values(override) for override in parsed}


def _values(override: Override) -> list[str]:
    key = override.get_key_element()
    if not override.is_sweep_override():
        line = override.input_line
        assert line is not None
        return [line if override.is_delete() else f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        raise UserError(f"{override.input_line}: a sweep needs values, not a range to search")
    values = [f"{key}={value}" for value in override.sweep_string_iterator()]
    if not values:
        raise UserError(f"{override.input_line}: matches no option")
    return values


def _refuse_unknown(key: str, values: Sequence[str], all_axes: Sequence[Axes]) -> None:
    known = list(dict.fromkeys(itertools.chain(*(axes.get(key, ()) for axes in all_axes))))
    for value in values:
        if value not in known:
            options = [each.partition("=")[2] for each in known]
            guess = near(value.partition("=")[2], options)
            raise UserError(f"{value}: no run of the sweep has it{guess}")
