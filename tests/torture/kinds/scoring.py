"""kill -9 of processes that score the same references at once: no number is lost or wrong."""

from __future__ import annotations

from random import Random

from harness import TINY

from torture.place import Place, succeeded

RUN = ("weighting=vaw",)


def trial(place: Place, random: Random) -> None:
    reference = place.reference(*RUN)
    number = random.choice([2, 2, 3])
    commands = [
        place.start("train.py", *TINY, *RUN, f"outputs=../others/{index}")
        for index in range(number)
    ]
    victims = random.sample(commands, random.randint(1, number))
    for command in victims:
        seconds = random.uniform(0, 2 * reference.seconds)
        place.notes.append(f"killed after {seconds:.2f} s")
        if not (done := command.kill_after(seconds)).killed:
            succeeded(done)
    for command in commands:
        if command not in victims:
            succeeded(command.wait())
    succeeded(place.train(*RUN))
    place.ends_like(reference)
