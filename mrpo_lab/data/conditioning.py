"""How lambda enters the prompt: as weights of aspects in the system message."""

from __future__ import annotations

from collections.abc import Sequence

from mrpo_lab.data.texts import Message


def conditioned(
    prompt: Sequence[Message], aspects: Sequence[str], weights: Sequence[float]
) -> tuple[Message, ...]:
    """The prompt with lambda, the weights of the aspects, written into its system message.

    Aspects come in the order of their weights, largest first; those below 0.005 are left out. For a
    template without a system role, ``chat.fold_system`` puts the message before the first user
    message, as it does with any system message.

    Args:
        weights: (A,) lambda, one weight per aspect.
    """
    ranked = sorted(zip(aspects, weights, strict=True), key=lambda pair: -pair[1])
    listed = ", ".join(f"{aspect} {weight:.2f}" for aspect, weight in ranked if weight >= 0.005)
    request = f"What matters in the reply: {listed}."
    if prompt[0]["role"] == "system":
        request = f"{prompt[0]['content']}\n\n{request}"
        prompt = prompt[1:]
    return ({"role": "system", "content": request}, *prompt)
