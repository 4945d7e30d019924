"""kill -9 while a policy is trained, evaluated, saved or tracked: nothing shows it afterwards."""

from __future__ import annotations

from functools import partial
from random import Random

import wandb_files
from harness import TINY

from torture.events import at_event, die
from torture.place import Place, succeeded
from torture.process import BrokenError

STATEFUL = (
    "train.epochs=2",
    "train.schedule=cosine",
    "train.warmup_steps=3",
    "train.max_grad_norm=0.5",
)
LORA = "model.lora={r: 2, lora_dropout: 0.3, target_modules: [q_proj, v_proj]}"
RUNS = {
    "arwc": ("weighting=arwc",),
    "swcw": ("weighting=swcw", "weighting.window=3"),
    "swcw_oh": ("weighting=swcw_oh",),
    "tsw": ("weighting=tsw", "loss=mrpo"),
    "dropout": ("weighting=swcw", LORA),
    "samples": ("weighting=vaw", "train.samples=1", "train.sample_tokens=4"),
    "wandb": ("weighting=tsw", "tracker=wandb"),
}


def trial(place: Place, random: Random) -> None:
    name = random.choice(list(RUNS))
    overrides = (*STATEFUL, *RUNS[name])
    reference = place.reference(*overrides)
    place.take_scores()
    for _ in range(random.choice([1, 1, 2, 3])):
        if random.random() < 0.5:
            number = random.randint(1, reference.events)
            done = place.train(*overrides, before=partial(at_event, number, die))
            place.notes.append(f"killed at change {number} of a file")
        else:
            seconds = random.uniform(0, reference.seconds)
            command = place.start("train.py", *TINY, *overrides)
            done = command.kill_after(seconds)
            place.notes.append(f"killed after {seconds:.2f} s")
        if not done.killed:  # it was faster, or had less to do
            succeeded(done)
    succeeded(place.train(*overrides))
    place.ends_like(reference)
    if name == "wandb":
        mirrored(place)


def mirrored(place: Place) -> None:
    """W&B's file has every line of the metrics, once, and its end."""
    (run,) = place.runs
    files = list(run.glob("wandb/offline-run-*/*.wandb"))
    if len(files) != 1:
        raise BrokenError(f"{len(files)} offline W&B runs, expected 1")
    lines = wandb_files.read_jsonl(run / "metrics.jsonl")
    if [line["step"] for line in wandb_files.history(files[0])] != [x["step"] for x in lines]:
        raise BrokenError("W&B has other lines than metrics.jsonl")
    if wandb_files.exit_code(files[0]) != 0:
        raise BrokenError("W&B shows a failed run")
