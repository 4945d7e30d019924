"""Passes that do not fit into memory: halved once, with the same numbers; else one line.

Memory runs out for real: of torch's allocator, which is asked for a pebibyte, and of a process
whose address space is limited.
"""

import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from harness import assert_same, experiment, metrics, result, said_by
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mrpo_lab.errors import UserError
from mrpo_lab.models.policy import Policy, PolicyConfig
from mrpo_lab.models.references import Reference
from mrpo_lab.scoring.memory import PassSize, fitting, is_out_of_memory
from mrpo_lab.storage import cache

pytest_plugins = ("surroundings",)
pytestmark = pytest.mark.usefixtures("surroundings")


def exhaust() -> Tensor:
    """Ask torch for more memory than there is."""
    return torch.empty(2**50, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError("Unable to allocate 3.00 GiB for an array"), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), False),
        (OSError(errno.ENOENT, "No such file"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_the_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_the_allocator_of_the_cpu_is_recognized() -> None:
    with pytest.raises(RuntimeError) as failed:
        exhaust()
    assert is_out_of_memory(failed.value)
    said = r"^the data does not fit into memory: take less$"
    with pytest.raises(UserError, match=said), fitting("the data", "take less"):
        exhaust()
    with pytest.raises(KeyError), fitting("the data", "take less"):
        raise KeyError


class TestPassSize:
    """Items of 40, 30, 20, 10 tokens in passes of 100, on machines that hold fewer."""

    COSTS = (40, 10, 30, 20)

    def run(self, fits: int, size: PassSize, costs: Sequence[int] = COSTS) -> list[list[int]]:
        """The passes that were tried, in a memory for ``fits`` tokens."""
        tried: list[list[int]] = []

        def compute(group: list[int]) -> int:
            tried.append(group)
            if sum(costs[i] for i in group) > fits:
                exhaust()
            return sum(group)

        done = size.run(costs, compute)
        assert sorted(i for group, _ in done for i in group) == [0, 1, 2, 3]
        assert all(found == sum(group) for group, found in done)
        return tried

    def test_all_at_once_where_it_fits(self) -> None:
        assert self.run(100, PassSize(100, "train.token_budget")) == [[0, 2, 3, 1]]

    def test_half_where_it_does_not_and_from_then_on(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        size = PassSize(100, "train.token_budget")
        with caplog.at_level(logging.WARNING):
            assert self.run(60, size) == [[0, 2, 3, 1], [0], [2], [3, 1]]
        (line,) = caplog.messages
        assert line == (
            "train.token_budget: 100 tokens in one pass do not fit into memory: from now on there "
            "are 50 at most"
        )
        assert self.run(60, size) == [[0], [2], [3, 1]]

    def test_only_what_is_left_is_computed_again_unless_all_starts_over(self) -> None:
        class Shrinking:
            """A memory that holds the first pass and no second one of that size."""

            passes = 0

            def compute(self, group: list[int]) -> None:
                self.passes += 1
                if self.passes == 2:
                    exhaust()

        costs, again = [10] * 6, [False]
        groups = [g for g, _ in PassSize(30, "x").run(costs, Shrinking().compute)]
        assert groups == [[0, 1, 2], [3], [4], [5]]
        groups = [
            g
            for g, _ in PassSize(30, "x").run(
                costs, Shrinking().compute, lambda: again.__setitem__(0, True)
            )
        ]
        assert groups == [[i] for i in range(6)]
        assert again == [True]

    @pytest.mark.parametrize(
        ("costs", "fits", "said"),
        [
            (
                COSTS,
                35,
                "40 tokens in one pass do not fit into memory, and they are one item: "
                "lower dataset.max_tokens",
            ),
            (
                (10,) * 4,
                15,
                "20 tokens in one pass do not fit into memory, nor did twice as many: lower x",
            ),
        ],
    )
    def test_what_is_said_where_half_does_not_fit(
        self, costs: Sequence[int], fits: int, said: str
    ) -> None:
        with pytest.raises(UserError) as stopped:
            self.run(fits, PassSize(100, "x"), costs)
        assert str(stopped.value) == f"x: {said}"

    def test_other_errors_are_no_reason_to_halve(self) -> None:
        def wrong(group: list[int]) -> None:
            raise RuntimeError("shapes do not match")

        with pytest.raises(RuntimeError, match="shapes"):
            PassSize(100, "x").run(self.COSTS, wrong)


@contextmanager
def small_memory(training: int, evaluation: int, owner: Any = PolicyConfig) -> Iterator[None]:
    """Models that run out of memory if a pass has more tokens: in training at the end of the
    backward pass, when most of the gradient is there; else in the forward pass."""
    name = "build" if owner is PolicyConfig else "load"
    real: Callable[..., Any] = getattr(owner, name)

    def limited(layer: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        tokens = hidden.shape[0] * hidden.shape[1]
        if torch.is_grad_enabled() and tokens > training:
            hidden.register_hook(lambda slope: exhaust())
        elif not torch.is_grad_enabled() and tokens > evaluation:
            exhaust()

    def build(self: Any, *args: Any) -> Any:
        built = real(self, *args)
        model = built.model if isinstance(built, Policy) else built
        first = next(layer for n, layer in model.named_modules() if n.endswith("layers.0"))
        first.register_forward_hook(limited)
        return built

    with mock.patch.object(owner, name, build):
        yield


PLENTY = 10**9
DROPOUT = "model.lora={r: 4, lora_dropout: 0.1, init_lora_weights: gaussian}"


@pytest.mark.parametrize(
    ("fits", "how"), [(250, ["model.dtype=float64"]), (450, [DROPOUT, "kernels=off"])]
)
def test_training_in_half_passes_is_training_in_passes_of_half_the_size(
    tmp_path: Path, fits: int, how: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """To the bit: no gradient of the failed pass is left, and dropout begins anew."""
    with caplog.at_level(logging.WARNING), small_memory(fits, PLENTY):
        halved = experiment(tmp_path / "halved", *how, "train.micro_batch_tokens=9999")
    (line,) = [text for text in caplog.messages if "memory" in text]
    assert line.startswith("train.micro_batch_tokens: ")
    half = line.split()[-3]
    small = experiment(tmp_path / "small", *how, f"train.micro_batch_tokens={half}")
    assert_same(halved, small)
    whole = experiment(tmp_path / "whole", *how, "train.micro_batch_tokens=9999")
    if "dtype" in how[0]:
        for line_, other in zip(metrics(halved), metrics(whole), strict=True):
            assert line_ == pytest.approx(other, abs=1e-6, rel=1e-6)


def test_evaluation_and_scoring_go_on_in_half_passes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = experiment(tmp_path / "whole")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "models").symlink_to(cache.root() / "models")
    monkeypatch.setenv("MRPO_LAB_CACHE", str(tmp_path / "cache"))
    limits = small_memory(PLENTY, 1000), small_memory(PLENTY, 1000, Reference)
    with caplog.at_level(logging.WARNING), limits[0], limits[1]:
        halved = experiment(tmp_path / "halved", "reference_set.token_budget=1200")
    said = {text.partition(":")[0] for text in caplog.messages if "memory" in text}
    assert said >= {"train.token_budget", "reference_set.token_budget"}
    for line, other in zip(metrics(halved), metrics(whole), strict=True):
        assert line == pytest.approx(other, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize(
    ("training", "evaluation", "kernels", "said"),
    [
        (
            10,
            PLENTY,
            "off",
            "train.micro_batch_tokens: .* tokens in one pass do not fit into memory",
        ),
        (
            10,
            PLENTY,
            "auto",
            "reply of .* tokens does not fit into memory: lower dataset.max_tokens",
        ),
        (
            PLENTY,
            20,
            "auto",
            "train.token_budget: .* do not fit into memory, nor did twice as many",
        ),
    ],
)
def test_what_does_not_fit_by_half_ends_the_run_in_one_line(
    tmp_path: Path, training: int, evaluation: int, kernels: str, said: str
) -> None:
    with small_memory(training, evaluation), pytest.raises(UserError, match=said) as stopped:
        experiment(tmp_path, f"kernels={kernels}")
    assert "\n" not in str(stopped.value)
    if kernels == "off":
        assert result(tmp_path / "run") == {
            "status": "failed",
            "error": str(stopped.value),
            "steps": 0,
        }


def test_a_model_that_does_not_fit_is_named() -> None:
    def load(*_: Any, **__: Any) -> Any:
        exhaust()

    with (
        mock.patch.object(AutoModelForCausalLM, "from_pretrained", load),
        pytest.raises(UserError) as stopped,
    ):
        PolicyConfig(path="embedded:tiny7/tiny-qwen2").read(torch.device("cpu"))
    assert str(stopped.value) == (
        "embedded:tiny7/tiny-qwen2: a model of dtype bfloat16 does not fit into memory: choose a "
        "smaller dtype or model, or set quantization"
    )


LIMITED = """
import json, resource, sys
import torch
from transformers import AutoModelForCausalLM, Qwen2Config
torch.set_num_threads(1)
import numpy as np
from mrpo_lab.data.texts import TokenRow
from mrpo_lab.scoring.memory import PassSize
from mrpo_lab.scoring.scorer import ReplyScorer

torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(Qwen2Config(
    vocab_size=97, hidden_size=64, intermediate_size=2048, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2))
scorer = ReplyScorer(model)
rng = np.random.default_rng(0)
items = [tuple(TokenRow(np.r_[1, rng.integers(0, 97, 99)].astype(np.int32), 20) for _ in "ab")
         for _ in range(60)]

def gradient(size):
    model.zero_grad()
    def backward(group):
        (-scorer.logps([items[i] for i in group])[0].sum() / 100).backward()
    passes = size.run(scorer.costs(items), backward, model.zero_grad)
    return len(passes), torch.cat([p.grad.flatten() for p in model.parameters()])

_, expected = gradient(PassSize(2000, "x"))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
room = int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
size = PassSize(20_000, "train.micro_batch_tokens")
passes, found = gradient(size)
apart = float((found - expected).abs().max() / expected.abs().max())
print(json.dumps({"passes": passes, "size": size.tokens, "apart": apart}))
"""


def test_a_process_of_limited_memory_goes_on_with_half_passes() -> None:
    found = said_by(LIMITED, "700")
    assert found["passes"] > 1
    assert found["size"] < 20_000
    assert found["apart"] < 1e-4
