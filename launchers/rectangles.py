"""The runs of a sweep: products of axes, narrowed by the command line."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from mrpo_lab.cli import near
from mrpo_lab.errors import UserError

Axes = dict[str, list[str]]
"""Key to the ``key=value`` overrides it takes."""


def expand(
    rectangles: Mapping[str, Mapping[str, str]], arguments: Sequence[str], loader: ConfigLoader
) -> list[list[str]]:
    """The overrides of every run, each once.

    A rectangle maps keys to values in Hydra's syntax: ``a,b``, ``range(1,4)``, ``glob(solo_*)``.
    An argument for a key that a rectangle has keeps the runs it names; any other argument is one
    more axis of all rectangles.

    Raises:
        UserError: an argument names what no rectangle has, or leaves no run.
    """
    asked = parse(arguments, loader)
    if len(asked.get("sweep", ())) > 1:
        raise UserError(f"sweep: one at a time, got {', '.join(asked['sweep'])}")
    named = [parse([f"{k}={v}" for k, v in each.items()], loader) for each in rectangles.values()]
    taken = {key for axes in named for key in axes}
    narrowing = {key: values for key, values in asked.items() if key in taken}
    for key, values in narrowing.items():
        _refuse_unknown(key, values, named)
    further = {key: values for key, values in asked.items() if key not in taken}
    runs: dict[frozenset[str], list[str]] = {}
    for axes in named or [{}]:
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
    """Each key with the overrides it takes, the last word on a key counting."""
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


def _refuse_unknown(key: str, values: Sequence[str], rectangles: Sequence[Axes]) -> None:
    known = list(dict.fromkeys(itertools.chain(*(axes.get(key, ()) for axes in rectangles))))
    for value in values:
        if value not in known:
            options = [each.partition("=")[2] for each in known]
            guess = near(value.partition("=")[2], options)
            raise UserError(f"{value}: no run of the sweep has it{guess}")
