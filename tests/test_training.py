"""What a whole run does: it learns, micro-batches change nothing, and it stops at infinities."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft
import pytest
import torch
from harness import TINY, compose, experiment, metrics, read_json, result
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from mrpo_lab import embedded
from mrpo_lab.data.texts import Item, TokenRow
from mrpo_lab.errors import UserError
from mrpo_lab.experiment import Experiment, run_experiment
from mrpo_lab.models.policy import Policy, PolicyConfig
from mrpo_lab.objective.scores import Scores
from mrpo_lab.training.inputs import Data
from mrpo_lab.training.state_file import load_state

pytest_plugins = ("surroundings",)
pytestmark = pytest.mark.usefixtures("surroundings")

# AdamW at this eps is all but linear in the gradient, so that rounding is not blown up.
SMOOTH = ("optimizer.eps=1.0", "optimizer.lr=0.1", "train.accuracy_after_step=true")
LORA = "model.lora={r: 4, init_lora_weights: gaussian, target_modules: [q_proj, down_proj]}"


def test_training_learns_the_preference(tmp_path: Path) -> None:
    sizes = ("dataset.pairs=300", "dataset.test=100", "protocol.batch_size=20")
    folder = experiment(tmp_path, *sizes, "reference_set.use=[tiny-qwen2]", "loss=dpo")
    found = read_json(folder / "result.json")
    assert found["test/accuracy"] > found["base/test_accuracy"] + 0.1
    losses = [line["train/loss"] for line in metrics(folder)[1:]]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-4)  # the policy is its own reference
    assert np.mean(losses[-3:]) < losses[0] - 0.05


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    runs = [
        experiment(
            tmp_path / str(size),
            *SMOOTH,
            "model.dtype=float64",  # float32 would add its rounding from step to step
            f"train.micro_batch_tokens={size}",
        )
        for size in (1, 200, 9999)
    ]
    start = load_file(embedded.folder("tiny7/tiny-qwen2") / "model.safetensors")
    first = load_file(runs[0] / "adapter" / "model.safetensors")
    assert any((first[name] - start[name]).abs().max() > 1e-4 for name in start)
    for run in runs[1:]:
        for line, other in zip(metrics(runs[0]), metrics(run), strict=True):
            assert other == pytest.approx(line, abs=1e-9, rel=1e-9)
        for name, tensor in load_file(run / "adapter" / "model.safetensors").items():
            torch.testing.assert_close(tensor, first[name], atol=1e-9, rtol=1e-9)


STEP, ROW = 4, 2
"""Where a number is spoilt: the third pair of the fourth batch, after the checkpoint of step 2."""


@contextmanager
def spoilt(change: Callable[[Data, int], None]) -> Iterator[list[str]]:
    """The real data, changed after loading for one training pair, whose name is given."""
    real = Experiment.data
    names = []

    def data(self: Experiment, prepared: Any, refs: Scores) -> Data:
        found = real(self, prepared, refs)
        order = self.seeds.rng("order", 0).permutation(len(found.train))
        pair = int(found.train[order[(STEP - 1) * self.config.batch_size + ROW]])
        names.extend(found.names([pair]))
        change(found, pair)
        return found

    with mock.patch.object(Experiment, "data", data):
        yield names


def rejected_reply(value: float) -> Callable[[Data, int], None]:
    """Nats per token of the rejected reply under the second reference."""

    def change(data: Data, pair: int) -> None:
        data.refs.sums[pair, 1, 1] = value * float(data.refs.counts[pair, 1, 1])

    return change


NAN, INFINITE, ENORMOUS = np.nan, -np.inf, -1e150
REPLY = "log-probability of the rejected reply"


@pytest.mark.parametrize(
    ("overrides", "value", "said"),
    [
        (["weighting=uniform"], NAN, ["the loss of {} is nan", f"tiny-llama: {REPLY} is nan"]),
        (["loss=mrpo"], INFINITE, ["the loss of {} is inf", f"tiny-llama: {REPLY} is -inf"]),
        (["weighting=arwc"], NAN, ["weight of reference tiny-llama is nan", REPLY, "of {} is nan"]),
        (["loss/link=ipo"], ENORMOUS, ["the gradient of {} is not finite in ", "1e+300, against"]),
    ],
    ids=["nan loss", "infinite loss", "nan weight", "infinite gradient"],
)
def test_infinity_stops_the_run_and_is_named(
    tmp_path: Path, overrides: Sequence[str], value: float, said: Sequence[str]
) -> None:
    with spoilt(rejected_reply(value)) as names, pytest.raises(UserError) as stopped:
        experiment(tmp_path, *overrides)
    message, folder = str(stopped.value), tmp_path / "run"
    for text in (f"step {STEP}: ", "tiny-llama", *said):
        assert text.format(names[0]) in message
    assert result(folder) == {"status": "failed", "error": message, "steps": STEP - 1}
    assert [line["step"] for line in metrics(folder)] == [0, 1, 2, 3]
    state = load_state(folder / "checkpoint" / "state.safetensors")
    assert state["scheduler"]["last_epoch"] == 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state["trainable"].values())
    assert not (folder / "adapter").exists()
    # The same command tries again, and with sound numbers goes on from the checkpoint.
    assert result(experiment(tmp_path, *overrides))["steps"] == 5


def test_score_of_an_evaluation_that_is_not_finite_is_named(tmp_path: Path) -> None:
    real = PolicyConfig.build

    def build(self: PolicyConfig, device: torch.device, seed: int) -> Policy:
        policy = real(self, device, seed)
        name = next(name for name in policy.trainable if "lora_A" in name)
        with torch.no_grad():
            policy.trainable[name][0, 0] = torch.inf
        return policy

    with mock.patch.object(PolicyConfig, "build", build), pytest.raises(UserError) as stopped:
        experiment(tmp_path, LORA)
    said = "evaluation: the policy's log-probability of the chosen reply of pair "
    assert str(stopped.value).startswith(said)
    assert result(tmp_path / "run")["status"] == "failed"
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_step_that_makes_a_weight_infinite_is_named(tmp_path: Path) -> None:
    """The largest number in float16 is 65504."""
    how = ("model.dtype=float16", "optimizer.lr=1e6", "train.checkpoint_every=1")
    with pytest.raises(UserError) as stopped:
        experiment(tmp_path, *how)
    message = str(stopped.value)
    assert message.startswith("step 1: the optimizer step makes ")
    assert message.endswith("infinite, though its gradient is finite: lower optimizer.lr")
    assert result(tmp_path / "run")["error"] == message
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.parametrize("weighting", ["arwc", "swcw"])
def test_pair_with_identical_replies_has_uniform_weights_and_is_counted(
    tmp_path: Path, weighting: str
) -> None:
    """Erratum 4: 0/0 in the published code, then NaN for the rest of the run."""
    rows = [
        {"prompt": f"Shop {i}?", "chosen": f"Walk {i} steps.", "rejected": f"No {i}."}
        for i in range(16)
    ]
    same = [dict(row, chosen=row["rejected"]) for row in rows[:4]]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *same]))
    tiny = [override for override in TINY if not override.startswith("dataset.")]
    cfg = compose(
        *tiny,
        "dataset=jsonl",
        f"dataset.path={data}",
        "dataset.drop_identical=false",
        "dataset.val=3",
        "dataset.test=3",
        "protocol.batch_size=1",
        f"weighting={weighting}",
        f"outputs={tmp_path}",
    )
    run_experiment(cfg, "run")
    lines = metrics(tmp_path / "run")[1:]
    assert all(np.isfinite(line["train/loss"]) for line in lines)
    undecided = [line["step"] for line in lines if line["alpha/undecided_pairs"] == 1]
    uniform = [line["step"] for line in lines if line["alpha/tiny-llama"] == pytest.approx(1 / 3)]
    # Three or four of the four pairs are trained on. swcw begins uniform, and an opinion that
    # comes from such a pair is one on the next.
    assert len(undecided) >= 2
    assert uniform == sorted({*undecided, 1} if weighting == "swcw" else undecided)
    assert result(tmp_path / "run")["undecided_pairs"] == len(undecided)
    if weighting == "arwc":  # d = 0 under every reference: the losses against all are the same
        same_loss = [
            line["step"]
            for line in lines
            if line["loss_by_reference/tiny-neox"] == line["loss_by_reference/tiny-llama"]
        ]
        assert same_loss == undecided


def plain_scores(model: nn.Module, rows: Sequence[TokenRow]) -> Tensor:
    """Sums of reply log-probabilities, one row at a time, as anybody would compute them."""
    model.eval()
    sums = []
    for row in rows:
        ids = torch.from_numpy(row.ids).long()[None]
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        sums.append(logps.gather(1, ids[0, 1:, None])[row.start - 1 :].sum())
    return torch.stack(sums).double()


def trained(outputs: Path, *overrides: str) -> tuple[Path, Tensor, Tensor, list[TokenRow]]:
    """A run's folder, its policy's scores before and after, and the rows that were scored."""
    kept: list[Policy] = []
    rows: list[TokenRow] = []
    before: list[Tensor] = []
    real = PolicyConfig.build

    def build(self: PolicyConfig, device: torch.device, seed: int) -> Policy:
        policy = real(self, device, seed)
        items = [Item(({"role": "user", "content": "Where can I buy bread?"},), ("Bakery.", "No"))]
        rows.extend(row for pair in self.tokenization.rows(items) for row in pair or ())
        before.append(policy.scorer.score([tuple(rows)], 999).sums[0])
        kept.append(policy)
        return policy

    with mock.patch.object(PolicyConfig, "build", build):
        folder = experiment(outputs, *overrides)
    return folder, before[0], kept[0].scorer.score([tuple(rows)], 999).sums[0], rows


# bitsandbytes computes 4-bit products in bf16 on some CPUs once a model is in evaluation mode.
@pytest.mark.parametrize(("quantization", "apart"), [("null", 1e-3), ("nf4", 0.1)])
def test_adapter_loads_in_plain_peft(tmp_path: Path, quantization: str, apart: float) -> None:
    one_step = ("protocol.batch_size=24", "optimizer.lr=0.05", f"model.quantization={quantization}")
    folder, before, after, rows = trained(tmp_path, LORA, *one_step)
    assert (after - before).abs().max() > 1.0
    assert {path.name for path in (folder / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    }
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(
        embedded.folder("tiny7/tiny-qwen2"),
        dtype=torch.float32,
        quantization_config=nf4 if quantization == "nf4" else None,
    )
    loaded = peft.PeftModel.from_pretrained(base, folder / "adapter")
    torch.testing.assert_close(plain_scores(loaded, rows), after, atol=apart, rtol=0)


def test_fully_trained_model_loads_in_plain_transformers(tmp_path: Path) -> None:
    folder, before, after, rows = trained(tmp_path)
    assert (after - before).abs().max() > 0.05
    loaded = AutoModelForCausalLM.from_pretrained(folder / "adapter")
    torch.testing.assert_close(plain_scores(loaded, rows), after, atol=1e-3, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    chat = [{"role": "user", "content": "Where can I buy bread?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == rows[0].ids[: rows[0].start].tolist()
