"""Every dependency has a lower bound with a pin above it, and a known licence."""

import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import dependencies
import pytest
from packaging.version import Version

LICENSES = dependencies.ROOT / "docs" / "licenses.md"


def test_pins_satisfy_the_lower_bounds() -> None:
    lines = (dependencies.ROOT / "requirements.lock").read_text().lower().splitlines()
    pins = dict(line.replace("_", "-").split("==") for line in lines if "==" in line)
    bounds = [line.lower().replace("_", "-").split("==") for line in dependencies.oldest()]
    assert len(bounds) > 30
    for name, lowest in bounds:
        assert Version(pins[name]) >= Version(lowest), name


def test_licenses_of_all_locked_packages_are_listed() -> None:
    listed = re.findall(r"^\| ([\w.-]+) \|", LICENSES.read_text(), re.M)[2:]  # the head
    assert listed == sorted(dependencies.locked(), key=str.lower), "run make licenses"


def test_what_packages_say_now_is_known() -> None:
    for name in dependencies.locked():
        try:
            assert dependencies.licence(name)
        except PackageNotFoundError:  # an older or newer environment than the lock's
            continue


@pytest.mark.parametrize("said", ["GPL-3.0-only", "MIT AND Proprietary", "", "UNKNOWN"])
def test_unknown_license_is_named(said: str) -> None:
    found = SimpleNamespace(get_all={"License-Expression": [said]}.get)
    with (
        mock.patch.object(dependencies, "metadata", return_value=found),
        pytest.raises(ValueError, match="somebody: unknown licence"),
    ):
        dependencies.licence("somebody")


def test_the_project_has_its_license() -> None:
    text = (Path(dependencies.ROOT) / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0" in text
