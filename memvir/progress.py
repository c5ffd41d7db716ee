"""What a person sees of a running run: a bar or plain lines, TensorBoard, and a stop that loses nothing."""

import signal
import sys
import time
from types import FrameType
from typing import Any

from tqdm import tqdm

from memvir.config import Runtime
from memvir.tensorboard import TensorBoardLog


class Progress:
    """Shows finished epochs and turns SIGINT and SIGTERM into a request to stop after the current step.

    A context manager. Without a board (in all processes of a run but the first) it shows nothing.
    """

    def __init__(self, name: str, epochs: int, runtime: Runtime, board: TensorBoardLog | None) -> None:
        self.name, self.epochs, self.runtime, self.board = name, epochs, runtime, board
        self.stop_requested = False
        self.signal = 0
        style = runtime.progress if board else "none"
        self.style = ("bar" if sys.stderr.isatty() else "plain") if style == "auto" else style
        self.recall = 0.0
        self.started, self.first_epoch = 0.0, 0

    def __enter__(self) -> "Progress":
        self.handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=self.epochs, desc=self.name, unit="epoch", disable=self.style != "bar", leave=True)
        self.started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.bar.close()

    def epoch_done(self, trainer: Any) -> None:
        row = trainer.history.rows[-1]
        if not self.first_epoch:  # a run that is continued did its first epochs in another process
            self.first_epoch = int(row["epoch"])
        self.recall = row.get("recall_at_1", self.recall)
        if self.board:
            self.board.add_epoch(row)
        if self.style == "bar":
            self.bar.n = int(row["epoch"])
            self.bar.set_postfix_str(
                f"loss {row['loss']:.3f}, R@1 {self.recall:.1%}, {trainer.images_per_second:.0f} images/s"
            )
        elif self.style == "plain" and "recall_at_1" in row:
            print(
                f"{self.name} epoch {row['epoch']}/{self.epochs}: loss {row['loss']:.4f}, Recall@1 {self.recall:.2%}, "
                f"{trainer.images_per_second:.0f} images/s, {self._time_left(int(row['epoch']))} left",
                file=sys.stderr,
                flush=True,
            )

    def _time_left(self, epoch: int) -> str:
        done = epoch - self.first_epoch + 1
        seconds = (time.monotonic() - self.started) / done * (self.epochs - epoch)
        return tqdm.format_interval(seconds)

    def _stop(self, number: int, _: FrameType | None) -> None:
        self.stop_requested, self.signal = True, number
