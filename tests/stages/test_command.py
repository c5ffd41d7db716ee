"""A stage as a command: what is wrong is one line, and an exit code."""

import os
import signal
import subprocess
import sys

import pytest

from memvir.errors import UserError
from stages import one_line_errors, stage
from tests.forked import forked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: --seed"),
        (("--seed", "one"), "argument --seed: invalid int value: 'one'"),
        (("--seed", "1", "--model", " "), "argument --model: expected a path, found ' '"),
        (("--seed", "1", "--jobs", "0"), "argument --jobs: expected 1 or more, found '0'"),
        (("--seed", "1", "--jobs", "-1"), "argument --jobs: expected 1 or more, found '-1'"),
        (("--seed", "1", "--colour", "red"), "unrecognized arguments: --colour red"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(monkeypatch, capsys, arguments, message):
    @stage
    def main(params, seed, model, jobs):
        raise AssertionError("not reached")

    monkeypatch.setattr(sys, "argv", ["stage", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {message}; --help lists the options\n"


def test_outside_the_repositorys_top_folder_a_stage_says_so(monkeypatch, tmp_path):
    @stage
    def main(params):
        raise AssertionError("not reached")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stage"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == "error: params.yaml: not found; run this from the repository's top folder"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UserError("two\nlines"), "error: two lines"),
        (
            FileNotFoundError(2, "No such file or directory", "x"),
            "error: x: No such file or directory; `dvc repro` makes",
        ),
    ],
)
def test_an_error_of_the_user_is_one_line(error, text):
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    assert end.value.code.startswith(text) and "\n" not in end.value.code


def test_an_error_of_ours_is_not_hidden(monkeypatch):
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError("ours")
    monkeypatch.setenv("MEMVIR_DEBUG", "1")
    with pytest.raises(UserError), one_line_errors():
        raise UserError("theirs")


@pytest.mark.parametrize("lines", [1, 10_000])  # in the buffer to the end, or too many for it
@forked
def test_when_nobody_reads_on_a_stage_ends_without_a_word(lines):
    reader, writer = os.pipe()
    os.close(reader)
    monitor, errors = os.pipe()
    os.dup2(errors, 2)
    os.close(errors)
    sys.stdout = os.fdopen(writer, "w")
    with pytest.raises(SystemExit) as end, one_line_errors():
        for _ in range(lines):
            print("a line")
    assert end.value.code == 128 + signal.SIGPIPE
    sys.stdout.close()  # as Python does at its end: nothing is tried again
    os.close(2)
    assert os.read(monitor, 100) == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@forked
def test_a_full_disk_behind_the_output_is_one_line():
    sys.stdout = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(SystemExit) as end, one_line_errors():
        print("a line")
    assert end.value.code.startswith("error: file system: No space left on device")
    sys.stdout.close()


def test_what_the_terminal_cannot_write_is_escaped_and_a_closed_stderr_is_no_error(tmp_path):
    code = "import sys; from stages import one_line_errors\nwith one_line_errors(): print('±'); sys.stderr.write('x')"
    shell = ["sh", "-c", f'exec "{sys.executable}" -c "$0" 2>&-', code]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    outcome = subprocess.run(shell, capture_output=True, env=environment, text=True)
    assert (outcome.returncode, outcome.stdout) == (0, "\\xb1\n")


@pytest.mark.parametrize("by_torchrun", [False, True])
def test_only_torchrun_says_how_many_processes_there_are(by_torchrun):
    given = {
        "WORLD_SIZE": "4",
        "RANK": "0",
        "MASTER_ADDR": "node",
        **({"TORCHELASTIC_RUN_ID": "x"} if by_torchrun else {}),
    }
    code = "import os, stages; print(sorted({'WORLD_SIZE', 'RANK', 'MASTER_ADDR'} & os.environ.keys()))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **given}, capture_output=True, text=True)
    assert done.stdout == (f"{sorted(given.keys() - {'TORCHELASTIC_RUN_ID'})}\n" if by_torchrun else "[]\n"), (
        done.stderr
    )
