"""Where a node works: in the sweep's folder if it can see it, in a copy of its inputs if it cannot."""

import shutil
import socket
import tarfile

import pytest

from memvir.errors import UserError
from memvir.sweep import cluster


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / "project"
    (folder / "memvir").mkdir(parents=True)
    (folder / "memvir" / "code.py").write_text("code")
    (folder / "params.yaml").write_text("numbers")
    return folder


def test_a_node_that_reads_the_sweeps_token_works_in_place(root):
    (root / cluster.TOKEN).parent.mkdir()
    (root / cluster.TOKEN).write_text("mine")
    assert cluster.Workspace(root, "mine").folder(None) == root


@pytest.mark.parametrize("token", [None, "another sweep's"])
def test_a_node_that_does_not_works_in_one_copy_of_the_inputs(root, token):
    if token:
        (root / cluster.TOKEN).parent.mkdir()
        (root / cluster.TOKEN).write_text(token)
    inputs = cluster.pack(root, ["memvir", "params.yaml", "not there"])
    shutil.rmtree(root / "memvir")
    copy = cluster.Workspace(root, "mine").folder(inputs)
    assert copy != root and (copy / "memvir" / "code.py").read_text() == "code"
    (copy / "made").write_text("result")
    assert cluster.Workspace(root, "mine").folder(inputs) == copy and (copy / "made").exists()
    cluster.unpack(cluster.pack(copy, ["made"]), root)
    assert (root / "made").read_text() == "result"


def test_outputs_that_lead_outside_the_folder_are_refused(root):
    (root / "made").write_text("result")
    archive = root.parent / "attack.tar"
    with tarfile.open(archive, "w") as members:
        members.add(root / "made", arcname="../outside")
    with pytest.raises(tarfile.OutsideDestinationError):
        cluster.unpack(archive.read_bytes(), root)
    assert not (root.parent / "outside").exists()


def test_a_head_that_is_being_started_is_waited_for_and_one_that_never_comes_is_an_error(monkeypatch, caplog):
    head = socket.socket()
    head.bind(("127.0.0.1", 0))
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            head.listen()

    monkeypatch.setattr(cluster.time, "sleep", sleep)
    host, port = head.getsockname()
    with caplog.at_level("INFO", "memvir"):
        cluster._knock(host, str(port))
    assert len(slept) == 3 and caplog.messages == [
        f"127.0.0.1:{port}: nothing answers yet; waiting up to 120 s for a Ray head to start"
    ]
    head.close()
    with pytest.raises(UserError, match=f"^--address 127.0.0.1:{port}: no Ray cluster answers there"):
        cluster.connect(f"127.0.0.1:{port}")
