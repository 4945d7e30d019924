"""``python -m benchmarks.measurements NAME SIZE WORKLOAD``: one measurement in its own process.

NAME is a key of ``MEASUREMENTS``, SIZE the number of tokens or pairs in a forward pass, WORKLOAD
JSON. The last line that is printed is JSON too.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.ours import trainer_of
from benchmarks.workload import (
    BETA,
    LORA,
    Workload,
    flops,
    forget_peak,
    matmul_peak,
    peak_gib,
    plain_flops,
    timed,
    wait,
)
from mrpo_lab.data.texts import Item, TokenRow
from mrpo_lab.models.policy import Policy
from mrpo_lab.models.weights import DTYPES, locate
from mrpo_lab.objective.scores import Scores
from mrpo_lab.objective.weighting import ARWC
from mrpo_lab.scoring.scorer import ReplyScorer
from mrpo_lab.training.config import TrainConfig
from mrpo_lab.training.workers import Workers

Numbers = dict[str, Any]
"""What was measured, by name."""
Rows = list[tuple[TokenRow, ...]]
OUT_OF_MEMORY: Numbers = {"pairs_per_second": 0.0, "out_of_memory": True}


def ours_training(work: Workload, tokens: int) -> Numbers:
    """Train with this project, with one reference and ``tokens`` tokens in a pass."""
    _, rows = work.pairs()
    return train(work.policy().build(Workers.start().device, 0), rows, work, tokens)


def train(policy: Policy, rows: Rows, work: Workload, tokens: int) -> Numbers:
    """Time optimizer steps of ``Trainer`` on a policy that was just built."""
    refs = policy.scorer.score(rows, 2048)  # the policy is its own reference before training
    config = TrainConfig(
        batch_size=work.batch, micro_batch_tokens=tokens, accuracy_after_step=False
    )
    losses: list[float] = []
    # With K = 1, alpha is 1.
    with trainer_of(policy, rows, Scores.stack([refs]), config, ARWC()) as trainer:
        pairs = np.arange(len(rows))

        def step(number: int) -> None:
            batch = pairs[number * work.batch : (number + 1) * work.batch]
            losses.append(trainer.train_step(batch)["train/loss"])

        seconds = timed(step, work.steps, trainer.workers.device)
    floor = flops(policy.model, rows[work.batch :], backward=True)
    return rate(work, seconds) | {
        "flops_per_second": floor / sum(seconds),
        "plain_flops_per_second": plain_flops(policy.model, rows[work.batch :], 4) / sum(seconds),
        "losses": losses,
        "packs": policy.scorer.packs,
    }


def ours_best(work: Workload, tokens: int) -> Numbers:
    """The fastest of ``ours_training`` with 1 to 8 times ``tokens`` in a pass, with and without
    gradient checkpointing; ``tried`` lists all of them. Includes the speed of the evaluation."""
    device = Workers.start().device
    _, rows = work.pairs()
    halves = replace(work, batch=len(rows) // 2, steps=1)
    tried: list[Numbers] = []
    for checkpointing in (False, True):
        asked = replace(work, gradient_checkpointing=checkpointing)
        for size in (tokens, 2 * tokens, 4 * tokens, 8 * tokens):
            forget_peak()
            policy = asked.policy().build(device, 0)
            point = {"tokens": size, "gradient_checkpointing": checkpointing}
            try:
                numbers = train(policy, rows, asked, size) | {"peak_gib": peak_gib()}
                scored = score(policy.scorer, rows, halves, size)
            except torch.OutOfMemoryError:
                tried.append(point | OUT_OF_MEMORY)
                break
            tried.append(point | numbers | {"scored_pairs_per_second": scored["pairs_per_second"]})
    return max(tried, key=lambda numbers: numbers["pairs_per_second"]) | {"tried": tried}


def trl_training(work: Workload, micro_batch: int) -> Numbers:
    """Train with TRL's DPOTrainer on the same pairs, with precomputed ``ref_logps``."""
    import datasets
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    items, _ = work.pairs()
    began: list[float] = []
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            began.append(clock())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(clock() - began[-1])

    folder = locate(work.model)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[work.dtype], **work.quantized()
    )
    for layer in model.modules():  # on a CPU its packed weights pass no gradients
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    with tempfile.TemporaryDirectory() as output:
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                output_dir=output,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=work.batch // micro_batch,
                max_steps=work.steps + 1,
                max_length=work.max_tokens,
                beta=BETA,
                learning_rate=1e-4,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                precompute_ref_log_probs=True,
                bf16=work.dtype == "bfloat16",
                gradient_checkpointing=work.gradient_checkpointing,
                train_sampling_strategy="sequential",
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=datasets.Dataset.from_list(trl_rows(items)),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **LORA),
            callbacks=[Clock()],
        )
        refs = np.array(
            [trainer.train_dataset["ref_chosen_logps"], trainer.train_dataset["ref_rejected_logps"]]
        )
        trainer.train()
    return rate(work, seconds[1:]) | {"ref_logps": refs.T.tolist()}


def trl_rows(items: list[Item]) -> list[dict[str, Any]]:
    """Pairs in TRL's conversational format."""
    return [
        {
            "prompt": list(item.prompt),
            "chosen": [{"role": "assistant", "content": item.replies[0]}],
            "rejected": [{"role": "assistant", "content": item.replies[1]}],
        }
        for item in items
    ]


def clock() -> float:
    """The time at which the device has finished all its work."""
    wait(Workers.start().device)
    return time.perf_counter()


def ours_scoring(work: Workload, tokens: int) -> Numbers:
    """Score with this project, without gradients."""
    device = Workers.start().device
    policy = work.policy(lora=False)
    scorer = ReplyScorer(policy.load(device))
    _, rows = work.pairs()
    return score(scorer, rows, work, tokens) | {"packs": scorer.packs}


def score(scorer: ReplyScorer, rows: Rows, work: Workload, tokens: int) -> Numbers:
    """Time ``ReplyScorer.score``."""
    found: list[Scores] = []

    def step(number: int) -> None:
        found.append(scorer.score(part(rows, work, number), tokens))

    seconds = timed(step, work.steps, scorer.device)
    return rate(work, seconds) | {
        "flops_per_second": flops(scorer.model, rows[work.batch :], False) / sum(seconds),
        "plain_flops_per_second": plain_flops(scorer.model, rows[work.batch :], 2) / sum(seconds),
        "logps": torch.cat([scores.sums for scores in found]).tolist(),
    }


def plain_scoring(work: Workload, tokens: int) -> Numbers:
    """Score with plain transformers: whole logits, batches of rows of similar length."""
    from transformers import AutoModelForCausalLM

    device = Workers.start().device
    model: Any = AutoModelForCausalLM.from_pretrained(locate(work.model), dtype=DTYPES[work.dtype])
    model.to(device).eval()
    _, pairs = work.pairs()

    @torch.no_grad()
    def batches(rows: list[TokenRow], dtype: torch.dtype) -> torch.Tensor:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        sums = torch.zeros(len(rows), dtype=torch.float64)
        while order:
            width = len(rows[order[-1]].ids)
            size = max(1, tokens // width)
            chosen, order = order[-size:], order[:-size]
            sums[chosen] = plain_logps(model, [rows[i] for i in chosen], dtype).double().cpu()
        return sums

    def step(number: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return batches([row for pair in part(pairs, work, number) for row in pair], dtype)

    seconds = timed(step, work.steps, device)
    # Numbers are compared with a softmax in float64, which is not timed: torch's softmax in float32
    # is off by 1e-5 nats per token.
    exact = torch.cat([step(number, torch.float64) for number in range(work.steps + 1)])
    return rate(work, seconds) | {"logps": exact.view(-1, 2).tolist()}


def plain_logps(model: Any, rows: list[TokenRow], dtype: torch.dtype) -> torch.Tensor:
    """Log-probability of each row's reply in nats, with the softmax in ``dtype``."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    reply = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.from_numpy(row.ids).long()
        mask[i, : len(row.ids)] = 1
        reply[i, row.start : len(row.ids)] = 1
    ids, mask, reply = (tensor.to(model.device) for tensor in (ids, mask, reply))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logps = logits.to(dtype).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    sums: torch.Tensor = (logps * reply[:, 1:]).sum(-1)
    return sums


def trl_scoring(work: Workload, micro_batch: int) -> Numbers:
    """Score with TRL's precomputation of ``ref_logps``, as its trainer calls it."""
    import datasets
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    items, _ = work.pairs()
    folder = locate(work.model)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[work.dtype])
    with tempfile.TemporaryDirectory() as output:
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                output_dir=output,
                max_length=work.max_tokens,
                bf16=work.dtype == "bfloat16",
                report_to=[],
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=datasets.Dataset.from_list(trl_rows(items)),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        loader = DataLoader(
            trainer.train_dataset, batch_size=micro_batch, collate_fn=trainer.data_collator
        )
        batches = list(trainer.accelerator.prepare(loader))
        each = work.batch // micro_batch
        model.eval()
        found: list[torch.Tensor] = []

        def step(number: int) -> None:
            for batch in batches[number * each : (number + 1) * each]:
                found.append(torch.stack(trainer.compute_ref_log_probs(model, batch), 1).cpu())

        seconds = timed(step, work.steps, model.device)
    return rate(work, seconds) | {"logps": torch.cat(found).tolist()}


def part(rows: list[Any], work: Workload, number: int) -> list[Any]:
    """The rows of a step."""
    return rows[number * work.batch : (number + 1) * work.batch]


def rate(work: Workload, seconds: list[float]) -> Numbers:
    """Pairs per second from the seconds of each step."""
    return {
        "pairs_per_second": work.batch / statistics.median(seconds),
        "seconds": seconds,
    }


def peak(work: Workload, _: int) -> Numbers:
    """Operations per second of large matrix products."""
    return {"flops_per_second": matmul_peak(DTYPES[work.dtype], Workers.start().device)}


MEASUREMENTS = {
    "ours_training": ours_training,
    "ours_best": ours_best,
    "trl_training": trl_training,
    "ours_scoring": ours_scoring,
    "plain_scoring": plain_scoring,
    "trl_scoring": trl_scoring,
    "peak": peak,
}


def main() -> None:
    name, size, work = sys.argv[1], int(sys.argv[2]), Workload(**json.loads(sys.argv[3]))
    torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    try:
        numbers = MEASUREMENTS[name](work, size)
    except torch.OutOfMemoryError:
        numbers = OUT_OF_MEMORY
    print(json.dumps(numbers | {"peak_gib": peak_gib()}))


if __name__ == "__main__":
    main()
