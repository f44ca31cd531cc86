"""What a tool does before it trains: logs, random seeds, memory, and the config in the output folder."""

import logging
import os

import torch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from rt_detectron.utils.files import write_text
from rt_detectron.utils.memory import keep_freed_memory

logger = logging.getLogger(__name__)


def set_up(args, folder: str, seed: int = -1, cudnn_benchmark: bool = False) -> None:
    """Detectron2's ``default_setup``, but that the config is left to :func:`save_config`.

    Args:
        args: of the command line, for log.txt.
        folder: of the output; it is made.
        seed: of this process's random numbers is this plus its rank; -1 draws one.
        cudnn_benchmark: let cuDNN try which convolution is fastest.
    """
    rank = comm.get_rank()
    if comm.is_main_process():
        os.makedirs(folder, exist_ok=True)
    for name in ("fvcore", "detectron2", "rt_detectron"):
        setup_logger(folder, distributed_rank=rank, name=name)
    logger.info("Process %d of %d", rank, comm.get_world_size())
    logger.info("Environment:\n%s", collect_env_info())
    logger.info("Command line: %s", args)
    seed_all_rng(None if seed < 0 else seed + rank)
    torch.backends.cudnn.benchmark = cudnn_benchmark
    if not torch.cuda.is_available():
        keep_freed_memory()


def save_config(text: str, folder: str) -> None:
    """Write ``config.yaml``, in the first process. Call it once nothing can be refused any more.

    Before that, the folder may hold the config of another run, which this one must not overwrite.
    """
    if comm.is_main_process():
        path = os.path.join(folder, "config.yaml")
        write_text(path, text)
        logger.info("The whole configuration, in %s:\n%s", path, text)
