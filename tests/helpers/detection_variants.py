"""Trains detectors in two processes, or as they should in one, and leaves what each process ends with.

    detection_variants.py together|alone FOLDER OPTIONS

OPTIONS is JSON: for each variant's name its config keys. Each process writes FOLDER/NAME/RANK.pth.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from detectron2.utils import comm
from small_detectors import ThreeConvolutions  # noqa: F401  (registers it)

from rt_detectron.detection import Trainer, load_detector_config
from rt_detectron.engine.launch import launch
from rt_detectron.engine.train_hooks import StepSeed
from rt_detectron.utils.errors import one_line_errors
from rt_detectron.utils.seeds import seed_all

CONFIG = "configs/demo/mask_rcnn_r18_fpn.yaml"
STEPS = 4
PROCESSES = 2


def main(args: argparse.Namespace) -> None:
    os.chdir(Path(__file__).parents[2])
    for name, options in args.options.items():
        folder = args.folder / name
        options = {"OUTPUT_DIR": folder, "SOLVER.MAX_ITER": STEPS, **options}
        cfg = load_detector_config(CONFIG, [str(part) for pair in options.items() for part in pair])
        if comm.is_main_process():
            folder.mkdir(exist_ok=True)
        train(cfg, folder / f"{comm.get_rank()}.pth", resume=False, alone=args.how == "alone")
        if args.how == "together" and (folder / "model_0000001.pth").is_file():
            comm.synchronize()
            if comm.is_main_process():
                (folder / "model_final.pth").rename(folder / "uninterrupted.pth")
                (folder / "last_checkpoint").write_text("model_0000001.pth")
            comm.synchronize()
            train(cfg, folder / f"resumed_{comm.get_rank()}.pth", resume=True)


def train(cfg, path: Path, resume: bool, alone: bool = False) -> None:
    """Write the start, the weights in the end, and what was evaluated."""
    # As Detectron2 seeds its processes: each draws the layers without pretrained weights by itself.
    np.random.seed(comm.get_rank())
    torch.manual_seed(comm.get_rank())
    evaluated = []

    def test(cls, cfg, model, evaluators=None):
        evaluated.append({key: value.clone() for key, value in model.state_dict().items()})
        return {}

    Trainer.test = classmethod(test)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    if alone:
        step_by_parts(trainer)
    start = {key: value.clone() for key, value in trainer._trainer.detector.state_dict().items()}
    trainer.train()
    final = trainer._trainer.detector.state_dict()
    torch.save({"start": start, "weights": final, "evaluated": evaluated[-1]}, path)


def step_by_parts(trainer: Trainer) -> None:
    """Have the parts of a batch, as processes get them, give their mean gradient one after the other."""
    inner = trainer._trainer
    (seed,) = [hook.seed for hook in trainer._hooks if isinstance(hook, StepSeed)]

    def run_step() -> None:
        batch = next(inner._data_loader_iter)
        inner.optimizer.zero_grad()
        for rank in range(PROCESSES):
            seed_all(seed, inner.iter, rank)
            sum(inner.model(batch[rank::PROCESSES]).values()).backward()
        for parameter in inner.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= PROCESSES
        inner.optimizer.step()

    inner.run_step = run_step


if __name__ == "__main__":
    how, folder, options = sys.argv[1:]
    args = argparse.Namespace(how=how, folder=Path(folder), options=json.loads(options))
    args.num_gpus = PROCESSES if how == "together" else 1
    args.num_machines, args.machine_rank, args.dist_url = 1, 0, "auto"
    with one_line_errors():
        launch(main, args)
