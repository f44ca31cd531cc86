"""Two processes, the second of which ends as the first argument says, while the first one waits."""

import argparse
import os
import signal
import sys
import time

import torch
from detectron2.utils import comm

from rt_detectron.engine import launch
from rt_detectron.engine.signals import StopSignals
from rt_detectron.utils.errors import InputError, one_line_errors

launch.GRACE_SECONDS = 1.0


def main(args: argparse.Namespace) -> None:
    if comm.get_rank() == 0:
        {"deaf": deaf}.get(args.how, wait)()
    else:
        {"killed": killed, "stopped": stopped, "fine": wait}.get(args.how, mistaken)()
    print("process", comm.get_rank(), "went on")


def wait() -> None:
    torch.distributed.all_reduce(torch.ones(1))


def deaf() -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    time.sleep(600)


def mistaken() -> None:
    raise InputError("this file is not there: choose another one")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped() -> None:
    signals = StopSignals()
    with signals.handled(), signals.stopping_at_once():
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    address = {"dist_url": sys.argv[2] if len(sys.argv) > 2 else "auto"}
    args = argparse.Namespace(how=sys.argv[1], num_gpus=2, num_machines=1, machine_rank=0, **address)
    with one_line_errors():
        launch.launch(main, args)
