"""What a GPU computes with, as far as a machine without one can tell."""

import inspect
import logging
from typing import Any

import numpy as np
import pytest
import torch
from flash_kernel import attend_each
from hypothesis import given
from hypothesis import strategies as st
from test_packing import ITEMS, items_of, slow
from test_scoring import random_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from whole_logits import VOCABULARY, gradient, random_rows, weighted

from mrpo_lab.scoring import attention, varlen
from mrpo_lab.scoring.attention import AttentionOptions
from mrpo_lab.scoring.backend import CPU, CPU_16_BIT, GPU, backend_for
from mrpo_lab.scoring.head import Head
from mrpo_lab.scoring.kernels import fuse
from mrpo_lab.scoring.packing import Layout, Segment, pack
from mrpo_lab.scoring.scorer import ReplyScorer

pytest_plugins = ("flash_kernel",)


@st.composite
def segments(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """Of items of a prompt of 0 to 12 tokens and up to four replies, one after the other."""
    found: list[tuple[int, int, int, int]] = []
    end = 0
    for _ in range(draw(st.integers(1, 4))):
        first, prompt = end, draw(st.integers(0, 12))
        for reply in range(draw(st.integers(1, 4))):
            length = draw(st.integers(1, 14)) + (0 if reply else prompt)
            found.append((first, prompt if reply else 0, end, length))
            end += length
    return found


def layout_of(of: list[tuple[int, int, int, int]]) -> Layout:
    return Layout(tuple(Segment(*each) for each in of))


def visible(layout: Layout, window: int) -> np.ndarray:
    """(N, N), whether a query sees a key, by the definition: a key is in the query's own reply or
    in the prompt that it shares, not after the query, and not before its window."""
    n = layout.tokens
    seen = np.zeros((n, n), dtype=bool)
    for prefix_start, prefix, start, length in layout.segments:
        row = [*range(prefix_start, prefix_start + prefix), *range(start, start + length)]
        for position in range(prefix, prefix + length):
            for other in range(max(0, position - window + 1), position + 1):
                seen[row[position], row[other]] = True
    return seen


@given(segments(), st.sampled_from([1, 3, 7, 10**6]))
def test_visible_pairs_are_those_of_the_definition(
    of: list[tuple[int, int, int, int]], window: int
) -> None:
    """Read off by attention to values that name their own key."""
    layout = layout_of(of)
    n = layout.tokens
    query = torch.zeros(1, n, 1, dtype=torch.float64)
    options = AttentionOptions(1.0, min(window, n), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "flash_attention", attend_each)
        patch.setattr(varlen, "DTYPES", (torch.float64,))
        value = torch.eye(n, dtype=torch.float64)[None]
        patch.setattr(varlen, "HEAD_DIMENSION", n)
        share = varlen.varlen_attention(
            query.expand(1, n, n), query.expand(1, n, n), value, layout, options
        )
    np.testing.assert_array_equal((share[0] > 0).numpy(), visible(layout, min(window, n)))


@given(segments(), st.sampled_from([None, 1, 4]), st.integers(0, 2**16))
def test_values_and_gradients_are_those_of_the_blocks(
    of: list[tuple[int, int, int, int]], window: int | None, seed: int
) -> None:
    layout = layout_of(of)
    torch.manual_seed(seed)
    q, k, v = (
        torch.randn(groups, layout.tokens, 4, dtype=torch.float64, requires_grad=True)
        for groups in (6, 2, 2)
    )
    options = AttentionOptions(0.5, window or layout.tokens, None)
    slope = torch.randn(6, layout.tokens, 4, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "flash_attention", attend_each)
        patch.setattr(varlen, "DTYPES", (torch.float64,))
        found, expected = (
            (attended, *torch.autograd.grad(attended, (q, k, v), slope))
            for attended in (
                varlen.varlen_attention(q, k, v, layout, options),
                attention.block_attention(q, k, v, layout, options),
            )
        )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


class TestContract:
    """That torch's kernel is what ``varlen_attention`` takes it for."""

    def test_signature(self) -> None:
        theirs = inspect.signature(varlen_attn).parameters
        ours = inspect.signature(attend_each).parameters
        assert [*theirs][:7] == [*ours][:7]
        assert {*ours} <= {*theirs}
        assert all(theirs[name].kind is parameter.kind for name, parameter in ours.items())

    @pytest.mark.parametrize("window", [5, 10**6])
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_it_takes_what_it_is_given(
        self, device: str, window: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On fake tensors torch runs the kernel's checks and shapes, and not the kernel. Without a
        GPU there is no backward pass of fake CUDA tensors, so that is run on others."""
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        layout = pack(ITEMS, torch.device("cpu")).layout
        real = varlen.sequences(layout, torch.device("cpu"))
        trained = device == "cpu"
        with FakeTensorMode():

            def fake(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
                grad = trained and dtype.is_floating_point
                return torch.empty(*shape, dtype=dtype, device=device, requires_grad=grad)

            assert real.keys is not None
            there = real._replace(
                keys=fake(len(real.keys), dtype=torch.int64),
                query_ends=fake(len(real.query_ends), dtype=torch.int32),
                key_ends=fake(len(real.key_ends), dtype=torch.int32),
            )
            monkeypatch.setattr(varlen, "sequences", lambda layout, device: there)
            query, key, value = (fake(groups, layout.tokens, 8) for groups in (4, 2, 2))
            options = AttentionOptions(0.5, window, None)
            attended = varlen.varlen_attention(query, key, value, layout, options)
            assert attended.shape == query.shape
            if trained:
                slopes = torch.autograd.grad(attended.sum(), (query, key, value))
                assert [each.shape for each in slopes] == [query.shape, key.shape, value.shape]

    def test_what_it_cannot_compute_is_named(self) -> None:
        layout = pack(items_of((3, 2, 2)), torch.device("cpu")).layout

        def refused(dtype: torch.dtype, size: int, softcap: float | None = None) -> str:
            heads = torch.zeros(2, layout.tokens, size, dtype=dtype)
            with pytest.raises(NotImplementedError) as error:
                varlen.varlen_attention(
                    heads, heads, heads, layout, AttentionOptions(1.0, 99, softcap)
                )
            return str(error.value)

        assert "torch.float32" in refused(torch.float32, 8)
        assert "264 dimensions" in refused(torch.bfloat16, 264)
        assert "soft cap" in refused(torch.bfloat16, 8, 30.0)


class TestBackend:
    def test_is_chosen_by_device_and_dtype(self) -> None:
        cpu, gpu = torch.device("cpu"), torch.device("cuda")
        assert backend_for(cpu, torch.float32) is CPU
        assert backend_for(cpu, torch.bfloat16) is CPU_16_BIT
        assert backend_for(gpu, torch.float32) is backend_for(gpu, torch.bfloat16) is GPU

    def test_layers_are_fused_where_that_was_measured_to_help(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mrpo_lab.scoring.kernels.backend_for", lambda *_: GPU)
        model = random_model("llama").requires_grad_(False)
        before = {name: layer.forward for name, layer in model.named_modules()}
        fuse(model)
        assert {name: layer.forward for name, layer in model.named_modules()} == before

    @pytest.mark.usefixtures("gpu_backend")
    def test_a_kernel_that_fails_in_the_backward_pass_only(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Found before training, not in its first step; a frozen model may use the kernel."""

        class Raises(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
                return value.clone()

            @staticmethod
            def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
                raise RuntimeError("no kernel for float32")

        raises: Any = Raises.apply
        monkeypatch.setattr(varlen, "flash_attention", lambda *a, **k: raises(attend_each(*a, **k)))
        frozen = ReplyScorer(random_model("llama").requires_grad_(False))
        frozen.costs(ITEMS)
        assert frozen.packs
        model = random_model("llama")
        scorer = ReplyScorer(model)
        with caplog.at_level(logging.INFO):
            scorer.costs(ITEMS)
        assert not scorer.packs
        assert "no kernel for float32" in caplog.text
        sums = scorer.logps(ITEMS)[0]
        expected = slow(model, ITEMS)
        torch.testing.assert_close(sums, expected, rtol=0, atol=5e-5)
        torch.testing.assert_close(
            gradient(model, weighted(sums)),
            gradient(model, weighted(expected)),
            rtol=1e-3,
            atol=1e-3,
        )

    @pytest.mark.usefixtures("gpu_backend")
    @pytest.mark.parametrize("factor", [0.5, float("nan")])
    def test_a_kernel_with_a_wrong_gradient(
        self, factor: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def spoilt(*args: Any, **options: Any) -> torch.Tensor:
            attended = attend_each(*args, **options)
            return attended.detach() + factor * (attended - attended.detach())

        monkeypatch.setattr(varlen, "flash_attention", spoilt)
        scorer = ReplyScorer(random_model("llama"))
        with caplog.at_level(logging.INFO):
            scorer.costs(ITEMS)
        assert not scorer.packs
        assert "change" in caplog.text


class TestPaddingWithoutMask:
    def masks(self, model: Any) -> list[bool]:
        """Whether each pass of ``model`` was given a mask."""
        given: list[bool] = []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: given.append(kwargs.get("attention_mask") is not None),
            with_kwargs=True,
        )
        return given

    def test_right_padding_needs_none(self) -> None:
        model, rows = random_model("qwen2"), random_rows()
        scorer = ReplyScorer(model)
        scorer.padded_logps(rows)
        given = self.masks(model.model)
        scorer.padded_logps(rows)
        scorer.padded_logps(rows, "left")
        assert given == [False, True]
        off = ReplyScorer(model, kernels="off")
        given.clear()
        off.padded_logps(rows)
        assert given == [True]

    def test_a_model_that_counts_on_its_mask_keeps_it(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As one whose tokens see how long a row is."""
        model, rows = random_model("qwen2"), random_rows()
        real = model.model.forward

        def forward(*args: Any, attention_mask: Any = None, **options: Any) -> Any:
            output = real(*args, attention_mask=attention_mask, **options)
            width = output.last_hidden_state.shape[1]
            length = width if attention_mask is None else attention_mask.sum(-1)[:, None, None]
            output.last_hidden_state = output.last_hidden_state * (1 + length / 10)
            return output

        expected = []
        model.model.forward = forward
        scorer = ReplyScorer(model)
        for row in rows:
            expected.append(scorer.padded_logps([row])[0].item())
        with caplog.at_level(logging.INFO):
            found = scorer.padded_logps(rows)[0]
        assert found.tolist() == pytest.approx(expected, abs=2e-5)
        assert "padding needs a mask" in caplog.text


def test_head_agrees_with_torchs_fused_one() -> None:
    """``F.linear_cross_entropy`` is an implementation of its own of the head and its gradient."""
    torch.manual_seed(0)
    projection = torch.nn.Linear(16, VOCABULARY, bias=False).double()
    targets = torch.randint(VOCABULARY, (50,))
    slopes = torch.randn(50, dtype=torch.float64)
    for frozen in (False, True):
        projection.requires_grad_(not frozen)
        hidden = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
        head = Head(projection, VOCABULARY, logits_at_once=7 * VOCABULARY)
        ours = head.token_logps(hidden, targets)
        theirs = -torch.nn.functional.linear_cross_entropy(
            hidden, projection.weight, targets, reduction="none"
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        inputs = [hidden] if frozen else [hidden, projection.weight]
        for one, other in zip(
            *(torch.autograd.grad(logps, inputs, slopes) for logps in (ours, theirs)), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
