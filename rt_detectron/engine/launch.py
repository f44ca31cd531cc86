"""Start a tool's main() in every process of a training."""

import logging
import multiprocessing.connection
import os
import pickle
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from detectron2.engine import default_argument_parser
from detectron2.engine.launch import DEFAULT_TIMEOUT, _distributed_worker
from detectron2.utils import comm
from torch import distributed
from torch import multiprocessing as torch_multiprocessing
from torch.multiprocessing import ProcessContext, ProcessRaisedException

from rt_detectron.utils.errors import InputError, no_traceback_of_input_errors, one_line

# Exit statuses of a launched process, besides 0 and 1: it stopped on a signal; its connection broke, since
# another one has ended.
STOPPED, CUT_OFF = 75, 76
GRACE_SECONDS = 15.0  # after one has failed, the others have so long to end, and again after a SIGTERM
CONNECTION_LOST = re.compile(
    r"gloo/|connection (was )?(closed|reset)|broken pipe|remote process exited|communicator was aborted", re.I
)
ADDRESS_IN_USE = re.compile(r"EADDRINUSE|address already in use", re.I)


def launch(main: Callable, args) -> None:
    """Run ``main(args)`` in this process, in processes that are started here, or under torchrun.

    - As soon as one process fails, all end, and its error is raised here.
    - A SIGTERM, which clusters send ahead of a preemption, is passed on to the processes started here.
    - On one machine the processes meet in a file of their own, unless ``args.dist_url`` names an address, so
      that several trainings can run beside each other.

    Args:
        main: takes ``args`` alone.
        args: of Detectron2's ``default_argument_parser``. Under torchrun its num_gpus, num_machines,
            machine_rank and dist_url are ignored, since torchrun sets them.

    Raises:
        InputError: for numbers of processes and machines that cannot be, a missing or busy address, and if a
            process was killed.
    """
    if distributed.is_torchelastic_launched():
        with _process_of_torchrun(), _one_line_if_cut_off():
            main(args)
        return
    _check(args)
    world_size = args.num_machines * args.num_gpus
    if world_size == 1:
        main(args)
        return
    with _meeting_point(args) as url:
        context = torch_multiprocessing.start_processes(
            _worker,
            (main, world_size, args.num_gpus, args.machine_rank, url, (args,)),
            nprocs=args.num_gpus,
            join=False,
        )
        with _sigterm_passed_on(context):
            _join(context)


def _check(args) -> None:
    if args.num_gpus < 1 or args.num_machines < 1:
        raise InputError("--num-gpus and --num-machines must be at least 1")
    if not 0 <= args.machine_rank < args.num_machines:
        last = args.num_machines - 1
        raise InputError(
            f"--machine-rank {args.machine_rank} must be from 0 to {last}: --num-machines is {last + 1}"
        )
    if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        raise InputError(f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()}")


@contextmanager
def _meeting_point(args) -> Iterator[str]:
    # Detectron2's default is one port for each user, where two trainings of one user would meet; and a port
    # that is free when "auto" looks for it may be taken a moment later.
    is_open = args.dist_url in ("auto", default_argument_parser().get_default("dist_url"))
    if not is_open:
        yield args.dist_url
    elif args.num_machines > 1:
        raise InputError(
            f"--num-machines {args.num_machines} needs --dist-url tcp://HOST:PORT, with the first machine's "
            "name and a free port of it"
        )
    else:
        with tempfile.TemporaryDirectory(prefix="rt_detectron-") as folder:
            yield f"file://{folder}/store"


def _worker(local_rank: int, *args) -> None:
    if sys.platform == "linux":
        # Loaders start their workers as in a training of one process. Spawned, each would import everything
        # again.
        multiprocessing.set_start_method("fork", force=True)
    try:
        with no_traceback_of_input_errors(), _one_line_if_cut_off():
            _distributed_worker(local_rank, *args)
    except _CutOff:
        sys.exit(CUT_OFF)
    except SystemExit as end:
        sys.exit(end.code or STOPPED)


class _CutOff(InputError):
    """Another process has ended, and with it what the processes do together."""


def _is_own(record: logging.LogRecord) -> bool:
    """Keeps Detectron2's trainer from logging the traceback of a lost connection."""
    return not (record.exc_info and CONNECTION_LOST.search(str(record.exc_info[1])))


@contextmanager
def _one_line_if_cut_off() -> Iterator[None]:
    trainer = logging.getLogger("detectron2.engine.train_loop")
    trainer.addFilter(_is_own)
    try:
        yield
    except RuntimeError as error:  # torch has no type of its own for these
        text = one_line(error)
        if ADDRESS_IN_USE.search(text):
            raise InputError(f"--dist-url: the port is taken, choose another one ({text[:120]})") from None
        if CONNECTION_LOST.search(text):
            raise _CutOff(
                "another process of this training has ended, and this one with it: see what that one says"
            ) from None
        raise
    finally:
        trainer.removeFilter(_is_own)


def _join(context: ProcessContext) -> None:
    """Wait until all processes have ended, and raise what made the first one fail.

    A process that fails may leave others waiting for it, deaf to signals, so these are killed in the end.
    """
    failed: list[int] = []
    deadline, told_to_stop, interrupted = float("inf"), False, False
    while alive := [process for process in context.processes if process.is_alive()]:
        try:
            multiprocessing.connection.wait([process.sentinel for process in alive], timeout=1)
        except KeyboardInterrupt:  # which the processes may not have got
            _end(alive, how="kill" if interrupted else "terminate")
            told_to_stop = interrupted = True
        codes = [process.exitcode for process in context.processes]
        failed += [i for i, code in enumerate(codes) if code not in (None, 0, STOPPED) and i not in failed]
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS
        if STOPPED in codes and not told_to_stop:  # told alone, during an evaluation
            _end(alive, how="terminate")
            told_to_stop = True
        if time.monotonic() > deadline:
            _end(alive, how="terminate" if not told_to_stop else "kill")
            deadline, told_to_stop = time.monotonic() + GRACE_SECONDS, True
    codes = [process.exitcode for process in context.processes]
    failed += [i for i, code in enumerate(codes) if code not in (0, STOPPED) and i not in failed]
    if interrupted:
        raise KeyboardInterrupt
    if failed and all(codes[i] in (CUT_OFF, -signal.SIGTERM) for i in failed):
        if STOPPED in codes:
            raise SystemExit(0)
        if -signal.SIGTERM in codes:  # too early to be heeded
            raise SystemExit(128 + signal.SIGTERM)
    if failed:
        _raise_cause(context, failed)


def _end(processes: list, how: str) -> None:
    for process in processes:
        getattr(process, how)()


def _raise_cause(context: ProcessContext, failed: list[int]) -> None:
    """Raise the error of the process that failed by itself, before others that failed for want of it."""
    texts = {i: _traceback(context.error_files[i]) for i in failed}
    own = [i for i in failed if texts[i]]
    own.sort(key=lambda i: InputError.__name__ not in texts[i].splitlines()[-1])
    if own:
        first = own[0]
        message = f"\n\n-- Process {first} terminated with the following error:\n{texts[first]}"
        raise ProcessRaisedException(message, first, context.processes[first].pid)
    killed = [i for i in failed if context.processes[i].exitcode < 0]
    if killed:
        name = signal.Signals(-context.processes[killed[0]].exitcode).name
        raise InputError(
            f"process {killed[0]} was ended by {name}; for SIGKILL, look whether the machine ran out of "
            "memory. --resume goes on from the last checkpoint"
        )
    codes = {context.processes[i].exitcode for i in failed}
    if codes != {CUT_OFF}:
        raise SystemExit(max(codes - {CUT_OFF}))
    raise InputError("another machine's process of this training has ended: see what that one says")


def _traceback(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return pickle.load(file).strip()
    except FileNotFoundError:
        return ""


@contextmanager
def _process_of_torchrun() -> Iterator[None]:
    """The process groups that Detectron2's launch would make."""
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if has_gpu else "gloo", timeout=DEFAULT_TIMEOUT)
    try:
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        comm.synchronize()
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def _sigterm_passed_on(context: ProcessContext) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: _end(context.processes, how="terminate"))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
