"""What TensorBoard is given at the end of a run."""

import numpy as np

from memvir.experiment import tensorboard
from memvir.experiment.history import History
from memvir.experiment.tensorboard import TensorBoardLog
from memvir.params import parse_params
from tests import tiny


def test_of_very_many_embeddings_the_projector_gets_some_evenly_chosen_with_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "PROJECTED", 4)
    board = TensorBoardLog(tmp_path, parse_params(tiny.params()).run("tiny", "norm_softmax", 1), History())
    board.finish({"map": 0.5}, np.arange(20.0).reshape(10, 2), [f"class {number}" for number in range(10)])
    (names,), (values,) = (
        [path.read_text().split() for path in tmp_path.rglob(f"*{name}.tsv")] for name in ("ta", "rs")
    )
    assert names[1::2] == ["0", "3", "6", "9"] and [float(value) for value in values[::2]] == [0, 6, 12, 18]
