"""Two processes resume, each in a folder of its own, as on machines that share none."""

import argparse
import os
import sys

from detectron2.utils import comm
from torch import nn

from rt_detectron.checkpoint.checkpointer import TrainingCheckpointer, has_checkpoint
from rt_detectron.engine.launch import launch
from rt_detectron.utils.errors import one_line_errors


def main(args: argparse.Namespace) -> None:
    os.chdir(os.path.join(args.folder, str(comm.get_rank())))
    model = nn.Linear(1, 1)
    resumed = has_checkpoint("out") and TrainingCheckpointer(model, "out").resume()
    with open("resumed", "w") as file:
        file.write(f"{model.weight.item():g}" if resumed else "nothing")


if __name__ == "__main__":
    args = argparse.Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto", folder=sys.argv[1])
    with one_line_errors():
        launch(main, args)
