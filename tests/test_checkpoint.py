"""One file holds any state, whole or not at all, and runs no code when read."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mrpo_lab.errors import UserError
from mrpo_lab.training import state_file as checkpoint
from mrpo_lab.training.state_file import load_state, save_state

TENSORS = st.builds(
    lambda shape, dtype: (torch.arange(int(np.prod(shape))).reshape(shape) - 3).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]),
)
SCALARS = st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.text() | st.floats()
KEYS = st.text() | st.integers()
STATES = st.dictionaries(
    KEYS,
    st.recursive(
        SCALARS | TENSORS,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
        max_leaves=12,
    ),
)


def alike(one: Any, other: Any) -> bool:
    """Equal in value and type, NaN included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other or (one != one and other != other))  # noqa: PLR0124  (NaN)


@given(state=STATES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_state_comes_back_as_it_was(
    state: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "deep" / "state.safetensors"
    save_state(path, state)
    assert alike(load_state(path), state)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_views_parameters_and_shared_tensors_are_saved_by_value(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    state = {"weight": weight, "view": weight.T, "row": weight[1], "tied": weight}
    save_state(tmp_path / "state", state)
    loaded = load_state(tmp_path / "state")
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor)
        assert not loaded[name].requires_grad
    loaded["weight"][0, 0] = 9.0
    assert loaded["tied"][0, 0] == 0.0


def test_optimizer_goes_on_from_the_file_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def start() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = start()
    step(model, optimizer)
    save_state(tmp_path / "s", {"m": model.state_dict(), "o": optimizer.state_dict()})
    step(model, optimizer)
    resumed, other = start()
    state = load_state(tmp_path / "s")
    resumed.load_state_dict(state["m"])
    other.load_state_dict(state["o"])
    step(resumed, other)
    assert torch.equal(model.weight, resumed.weight)


def test_random_generator_of_numpy_goes_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rng.beta(5, 5, size=7)
    save_state(tmp_path / "s", {"rng": rng.bit_generator.state})
    other = np.random.default_rng(2)
    other.bit_generator.state = load_state(tmp_path / "s")["rng"]
    assert (rng.random(5) == other.random(5)).all()


def test_death_while_writing_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, {"step": 1, "w": torch.ones(3)})

    def half(tensors: dict[str, Tensor], draft: Path, **kwargs: Any) -> None:
        save_file(tensors, draft, **kwargs)
        draft.write_bytes(draft.read_bytes()[:20])
        raise KeyboardInterrupt

    with mock.patch.object(checkpoint, "save_file", half), pytest.raises(KeyboardInterrupt):
        save_state(path, {"step": 2, "w": torch.zeros(3)})
    assert load_state(path)["step"] == 1
    save_state(path, {"step": 3})
    assert load_state(path) == {"step": 3}


def test_every_truncation_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, {"step": 1, "w": torch.ones(3), "rest": [torch.zeros(2, 2), None]})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as refused:
            load_state(path)
        message = str(refused.value)
        assert message.startswith(f"{path}: damaged (")
        assert "\n" not in message
        assert message.endswith("delete it to start this run over")


def test_flipped_bit_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    state = {"w": torch.ones(3), "rest": [torch.zeros(2, dtype=torch.bool), None, "ü", 1e-7]}
    save_state(path, state)
    whole = path.read_bytes()
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"damaged \("):
            load_state(path)


def test_file_of_an_earlier_version_is_read_and_said_to_be_unverified(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state.safetensors"
    metadata = {"state": '{"dict": [["w", {"tensor": "000000"}]]}'}
    save_file({"000000": torch.ones(3)}, path, metadata=metadata)
    with caplog.at_level("INFO"):
        assert load_state(path)["w"].tolist() == [1.0] * 3
    assert caplog.messages == [f"{path} is of an earlier version, without a checksum: unverified"]


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"state": "{"},
        {"state": "[]"},
        {"state": '{"tensor": "7"}'},
        {"state": '{"a": 1}'},
    ],
)
def test_file_of_something_else_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "state.safetensors"
    save_file({"w": torch.ones(3)}, path, metadata=metadata)
    with pytest.raises(UserError, match="damaged"):
        load_state(path)


def test_file_is_plain_safetensors_with_json(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {"w": torch.ones(3), "step": 4})
    with safe_open(tmp_path / "s", framework="pt") as file:
        assert [file.get_tensor(name).tolist() for name in file.keys()] == [[1.0] * 3]  # noqa: SIM118
        assert "step" in json.dumps(json.loads(file.metadata()["state"]))
