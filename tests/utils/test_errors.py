import logging

import pytest
from torch._utils import ExceptionWrapper

from rt_detectron.utils.errors import InputError, one_line_errors


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


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        RuntimeError(""),
        RuntimeError("see rt_detectron.utils.errors.InputError: x"),
        KeyboardInterrupt(),
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
