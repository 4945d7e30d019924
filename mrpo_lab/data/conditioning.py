"""Where lambda enters the prompt: the weights of the aspects in the system message."""

from __future__ import annotations

from collections.abc import Sequence

from mrpo_lab.data.texts import Message


def conditioned(
    prompt: Sequence[Message], aspects: Sequence[str], weights: Sequence[float]
) -> tuple[Message, ...]:
    """The prompt with lambda in its system message, the weightiest aspect first and those of no
    weight unsaid. A template without such a role has it put before the first user message, as any
    system message."""
    ranked = sorted(zip(aspects, weights, strict=True), key=lambda pair: -pair[1])
    said = ", ".join(f"{aspect} {weight:.2f}" for aspect, weight in ranked if weight >= 0.005)
    request = f"What matters in the reply: {said}."
    if prompt[0]["role"] == "system":
        request = f"{prompt[0]['content']}\n\n{request}"
        prompt = prompt[1:]
    return ({"role": "system", "content": request}, *prompt)
