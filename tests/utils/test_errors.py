import errno
import logging
import os
import subprocess
import sys

import pytest
from torch._utils import ExceptionWrapper

from rt_detectron.utils.errors import InputError, building, did_you_mean, one_line_errors, optional_import


def printed(capsys, action) -> str:
    with pytest.raises(SystemExit) as end, one_line_errors():
        action()
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def throw(error):
    raise error


def test_the_message_and_status_2(capsys):
    assert printed(capsys, lambda: throw(InputError("x: do y"))) == "error: x: do y\n"


def test_lines_are_joined(capsys):
    assert printed(capsys, lambda: throw(InputError("x:\ndo y\n"))) == "error: x: do y\n"


def test_from_a_loaders_worker(capsys):
    try:
        throw(InputError("a.jpg: cannot be read; repair it"))
    except InputError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")  # as torch's workers do
    assert printed(capsys, wrapped.reraise) == "error: a.jpg: cannot be read; repair it\n"


def test_from_a_launched_process(capsys):
    # As torch.multiprocessing's ProcessRaisedException gives it.
    text = "\n\n-- Process 1 terminated with the following error:\nTraceback (most recent call last):\n"
    text += "rt_detectron.utils.errors.InputError: x: do y\n"
    assert printed(capsys, lambda: throw(RuntimeError(text))) == "error: x: do y\n"


def test_an_error_of_the_file_system_names_the_file(capsys, tmp_path):
    folder = str(tmp_path / "nowhere" / "x")
    assert printed(capsys, lambda: os.listdir(folder)) == f"error: {folder}: No such file or directory\n"


def test_a_full_disk_is_told_though_python_names_no_file(capsys):
    error = OSError(errno.ENOSPC, "No space left on device")
    line = "error: a file cannot be read, written or locked: No space left on device\n"
    assert printed(capsys, lambda: throw(error)) == line


def test_ctrl_c_leaves_no_traceback(capsys):
    with pytest.raises(SystemExit) as end, one_line_errors():
        throw(KeyboardInterrupt())
    assert end.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


def test_what_a_library_cannot_build_is_one_line_that_names_the_keys():
    def build(error):
        with building("the detector", "MODEL"):
            throw(error)

    with pytest.raises(InputError) as found:
        build(TypeError("x\ny"))
    assert str(found.value).startswith("cannot build the detector (TypeError: x y): check MODEL in")
    assert isinstance(found.value.__cause__, TypeError)  # for whoever looks into it
    with pytest.raises(InputError, match=r"^x: do y$"):
        build(InputError("x: do y"))
    with pytest.raises(KeyboardInterrupt):
        build(KeyboardInterrupt())


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        OSError("x"),
        RuntimeError(""),
        RuntimeError("see rt_detectron.utils.errors.InputError: x"),
        OSError(errno.ECONNRESET, "x"),
    ],
)
def test_everything_else_passes_through(error):
    with pytest.raises(type(error)) as found, one_line_errors():
        throw(error)
    assert found.value is error


def test_detectron2s_trainer_logs_no_traceback_of_it(caplog):
    logger = logging.getLogger("detectron2.engine.train_loop")

    def train(error):
        try:
            throw(error)
        except ValueError:
            logger.exception("Exception during training:")
            raise

    with pytest.raises(SystemExit), one_line_errors():
        train(InputError("x: do y"))
    assert not caplog.records
    with pytest.raises(ValueError, match="x"), one_line_errors():
        train(ValueError("x"))
    assert len(caplog.records) == 1
    assert not logger.filters


def test_near_names_are_offered_and_far_ones_are_not():
    assert did_you_mean("resnet5", ["resnet50", "vgg16"]) == "; did you mean resnet50?"
    assert did_you_mean("x", ["resnet50", "vgg16"]) == ""


def test_a_missing_package_is_named_by_what_pip_installs_it_by(monkeypatch):
    assert optional_import("json", "json", "this").loads("1") == 1
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError) as raised:
        optional_import("sklearn", "scikit-learn>=1.3", "logistic regression")
    line = 'logistic regression: scikit-learn>=1.3 is missing; run: pip install "scikit-learn>=1.3"'
    assert str(raised.value) == line


def test_what_a_package_itself_lacks_is_named(tmp_path, monkeypatch):
    (tmp_path / "rt_test_half.py").write_text("import rt_test_nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"half is missing \(No module named 'rt_test_nowhere'\)"):
        optional_import("rt_test_half", "half", "this")


def run_with_closed_output(script: str) -> subprocess.CompletedProcess:
    reading, writing = os.pipe()
    os.close(reading)
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", script]
    tool = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writing)
    return tool


@pytest.mark.parametrize("lines", [1, 100_000])  # within Python's buffer, and while printing
def test_a_reader_that_closes_the_pipe_ends_the_tool_without_a_word(lines):
    script = (
        "import sys\n"
        "from rt_detectron.utils.errors import one_line_errors\n"
        "with one_line_errors():\n"
        f"    print('line\\n' * {lines})\n"
        "    sys.exit(0)\n"
    )
    tool = run_with_closed_output(script)
    assert (tool.returncode, tool.stderr) == (141, "")


def test_an_error_is_printed_where_the_output_is_closed():
    script = (
        "from rt_detectron.utils.errors import InputError, one_line_errors\n"
        "with one_line_errors():\n"
        "    print('line')\n"
        "    raise InputError('x: do y')\n"
    )
    tool = run_with_closed_output(script)
    assert tool.returncode != 0
    assert tool.stderr.startswith("error: x: do y\n")


def test_another_pipe_that_closes_keeps_its_traceback():
    with pytest.raises(BrokenPipeError), one_line_errors():
        throw(BrokenPipeError(errno.EPIPE, "Broken pipe"))
