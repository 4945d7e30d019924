"""Messages that name the pair, the reference and the term behind a number that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mrpo_lab.objective.losses import PreferenceLoss
from mrpo_lab.objective.scores import Scores


def explain_loss(
    loss: PreferenceLoss,
    policy: Scores,
    refs: Scores,
    alpha: Tensor,
    target: Tensor,
    slugs: Sequence[str],
    names: Sequence[str],
) -> str:
    """Name the first pair whose loss is not finite, and the first term of it that is not."""
    values = loss(policy, refs, alpha, target).loss
    row = int((~torch.isfinite(values)).nonzero()[0, 0])
    text = f"the loss of {names[row]} is {float(values[row])}"
    logps = loss.logps(policy)[row]
    for reply, value in zip(reply_names(len(logps)), logps, strict=True):
        if not torch.isfinite(value):
            return f"{text}: the policy's log-probability of its {reply} reply is {float(value)}"
    for k, slug in enumerate(slugs):
        terms = {
            "alpha": alpha[row, k],
            **{
                f"log-probability of the {reply} reply": value
                for reply, value in zip(
                    reply_names(len(logps)), loss.logps(refs)[row, k], strict=True
                )
            },
            "loss against it": loss.by_reference(policy, refs, target)[row, k],
        }
        for term, value in terms.items():
            if not torch.isfinite(value):
                return f"{text}: reference {slug}: {term} is {float(value)}"
    return f"{text}: each term is finite, their combination is not"


def explain_weights(
    proportions: Tensor, refs: Scores, slugs: Sequence[str], names: Sequence[str]
) -> str:
    """Name the reference whose weight is not finite, and the pair whose score is the cause."""
    row, k = (~torch.isfinite(proportions)).nonzero()[0].tolist()
    text = f"the weight of reference {slugs[k]} is {float(proportions[row, k])}"
    for name, sums in zip(names, refs.sums, strict=True):
        for reply, value in zip(reply_names(len(sums[k])), sums[k], strict=True):
            if not torch.isfinite(value):
                return f"{text}: its log-probability of the {reply} reply of {name} is {value}"
    return text


def explain_gradient(
    backward_alone: Callable[[int], Scores],
    parameters: Mapping[str, nn.Parameter],
    loss: PreferenceLoss,
    refs: Scores,
    target: Tensor,
    slugs: Sequence[str],
    names: Sequence[str],
) -> str:
    """Run each pair of the batch alone to find the one whose gradient is not finite.

    Every process runs all of them, because the main one, which reports, may not have had the pair.
    """
    for row, pair in enumerate(names):
        for parameter in parameters.values():
            parameter.grad = None
        policy = backward_alone(row).to(torch.device("cpu"))
        for name, parameter in parameters.items():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                by_reference = loss.by_reference(policy, refs[[row]], target[[row]])[0]
                worst = int(by_reference.abs().argmax())
                return (
                    f"the gradient of {pair} is not finite in {name}; its largest loss is "
                    f"{float(by_reference[worst]):.4g}, against reference {slugs[worst]}"
                )
    return "the gradient is not finite, though that of each pair alone is"


def explain_parameters(parameters: Mapping[str, nn.Parameter]) -> str | None:
    """Name the first parameter that an optimizer step made infinite; None if all are finite."""
    for name, parameter in parameters.items():
        if not bool(torch.isfinite(parameter).all()):
            return (
                f"the optimizer step makes {name} infinite, though its gradient is finite: lower "
                "optimizer.lr"
            )
    return None


def explain_scores(policy: Scores, names: Sequence[str]) -> str | None:
    """Name the first item of which the policy's log-probability is not finite; None without one."""
    for name, sums in zip(names, policy.sums, strict=True):
        for reply, value in zip(reply_names(len(sums)), sums, strict=True):
            if not torch.isfinite(value):
                return f"the policy's log-probability of the {reply} reply of {name} is {value}"
    return None


def reply_names(replies: int) -> list[str]:
    """What messages call the replies to a prompt."""
    return ["chosen", "rejected"] if replies == 2 else [f"{i + 1}th" for i in range(replies)]
