"""Start a tool's main() in every process of a training."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import distributed


def launch(main: Callable, args) -> None:
    """Run ``main(args)`` in this process, in processes that Detectron2's launch starts, or under torchrun.

    A SIGTERM, which clusters send ahead of a preemption, is passed on to the processes started here.

    Args:
        main: takes ``args`` alone.
        args: of Detectron2's ``default_argument_parser``. Under torchrun its num_gpus, num_machines,
            machine_rank and dist_url are ignored, since torchrun sets them.
    """
    if distributed.is_torchelastic_launched():
        with _process_of_torchrun():
            main(args)
        return
    with _sigterm_passed_on():
        detectron2_launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )


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
def _sigterm_passed_on() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return

    def pass_on(signum, frame):
        children = multiprocessing.active_children()
        for child in children:
            child.terminate()
        if not children:  # no child to pass it on to: end as by default
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    previous = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
