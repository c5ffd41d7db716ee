"""What looks on while a run trains: shows its epochs, keeps TensorBoard's log, and hears what asks it to stop."""

import signal

from memvir.experiment.settings import Run, Runtime
from memvir.experiment.tensorboard import TensorBoardLog
from memvir.progress import Counter


class Watch:
    """A signal that asks to stop becomes a request to stop after the current step.

    Args:
        done: epochs that earlier processes trained.
        board: None, in all processes of a run but the first, shows nothing.
    """

    def __init__(self, run: Run, runtime: Runtime, done: int, board: TensorBoardLog | None) -> None:
        style = runtime.progress if board else "none"
        self.counter = Counter(f"{run.name} epoch", run.training.epochs, "epochs", done, style, leave=True)
        self.board = board
        self.recall = "–"  # not evaluated yet
        self.stop_requested = False
        self.signal: int = signal.SIGTERM  # if another process of the run was asked

    def stop(self, number: int) -> None:
        self.stop_requested, self.signal = True, number

    def epoch_done(self, row: dict[str, float], images_per_second: float) -> None:
        """Hear of a finished epoch: its row of the history."""
        evaluated = "recall_at_1" in row
        if evaluated:
            self.recall = f"{row['recall_at_1']:.2%}"
        if self.board:
            self.board.add_epoch(row)
        numbers = f"loss {row['loss']:.4f}, Recall@1 {self.recall}, {images_per_second:.0f} images/s"
        self.counter.add(1, numbers, now=evaluated)
