"""Records a run: its folder, which is the truth, and the tracker that mirrors it."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mrpo_lab.data.ids import text_ids
from mrpo_lab.errors import UserError, first_line
from mrpo_lab.models.policy import Policy
from mrpo_lab.objective.losses import PreferenceLoss
from mrpo_lab.objective.scores import Scores
from mrpo_lab.redaction import redact
from mrpo_lab.runs.folder import Run
from mrpo_lab.runs.test_pairs import reference_weights, write_test_pairs
from mrpo_lab.runs.tracking import Tracker
from mrpo_lab.runs.trade_off import write_trade_off
from mrpo_lab.storage.checksums import with_checksum
from mrpo_lab.storage.files import replacing_folder
from mrpo_lab.training.inputs import Data
from mrpo_lab.training.state import LoopState

logger = logging.getLogger(__name__)


class Recorder:
    """Writes everything that a run leaves behind, in the main process; does nothing in others."""

    def __init__(self, run: Run, tracker: Tracker, resolved: dict[str, Any], active: bool) -> None:
        """
        Args:
            resolved: the configuration that the tracker shows.
            active: whether this is the main process.
        """
        self.run, self._tracker = run, tracker
        self._resolved, self._active = resolved, active

    def start(self, past: bytes) -> None:
        """Open the run's files and its tracker.

        Args:
            past: what ``metrics.jsonl`` held when the checkpoint was written from which the run
                goes on; later lines are forgotten. Empty for a run that begins.
        """
        if self._active:
            lines = self.run.begin(past)
            with self.run.writing():  # W&B keeps its files in the folder too
                self._tracker.start(self.run.folder, self.run.name, self._resolved, lines)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one line to ``metrics.jsonl`` and to the tracker."""
        if self._active:
            self.run.log(step, metrics)
            with self.run.writing():
                self._tracker.log(step, metrics)

    def write_alpha(self, slugs: Sequence[str]) -> None:
        """Write ``alpha.parquet`` from the metrics so far."""
        if self._active:
            self.run.write_alpha(slugs)

    def fail(self, error: BaseException, state: LoopState) -> None:
        """Record a run that could not go on; its last checkpoint stays as it was."""
        interrupted = isinstance(error, KeyboardInterrupt)
        failure = {
            "status": "interrupted" if interrupted else "failed",
            "error": redact(str(error) or type(error).__name__),
            "steps": state.step,
            "wall_seconds": round(state.seconds, 3),
        }
        if not isinstance(error, (UserError, KeyboardInterrupt)):
            failure["traceback"] = redact("".join(traceback.format_exception(error)))
        if self._active:
            with suppress(UserError):  # the disk may be full, which is then why the run fails
                self.run.finish(failure)
            with suppress(UserError), self.run.writing():
                self._tracker.finish(failure, failed=True)

    def finish(
        self,
        result: Mapping[str, Any],
        policy: Policy,
        data: Data,
        target: Float[Tensor, "N_test R"],
        loss: PreferenceLoss,
        state: LoopState,
        trade_off: Sequence[Mapping[str, Any]],
    ) -> None:
        """Save what was trained, then ``result.json``, which marks the run as finished.

        The tracker comes before that: a run that is killed in between goes on from its last
        checkpoint, and is mirrored again.

        Args:
            target: how much each reply of the test split is to be preferred.
        """
        if not self._active:
            return
        with self.run.writing():
            with replacing_folder(self.run.folder / "adapter") as draft:
                policy.save(draft)
            after = Scores(**state.latest_test)
            write_test_pairs(
                self.run.folder / "test_pairs.parquet",
                data.ids[data.test],
                text_ids(data.items[i] for i in data.test.tolist())[0],
                data.slugs,
                data.refs[data.test.tolist()],
                Scores(**state.base_test),
                after,
                target,
                reference_weights(
                    loss,
                    data.in_loss_unit(after, data.test.tolist()),
                    data.loss_refs[data.test.tolist()],
                    target,
                ),
            )
            if trade_off:
                write_trade_off(self.run.folder / "trade_off.parquet", trade_off)
        self.run.write_alpha(data.slugs)  # as far as the metrics, wherever an earlier session died
        with self.run.writing():
            result = with_checksum({**result, "files": self.run.describe_files()})
        try:
            self._tracker.finish(result)
        except Exception as error:  # whatever a tracker raises, the run itself is finished
            logger.warning("tracker: it lacks the end of this run: %s", first_line(error))
        self.run.finish(result)
