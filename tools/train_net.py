#!/usr/bin/env python
"""Train and evaluate a detector, as Detectron2's own train_net.py, on a robust or a standard backbone.

Writes to OUTPUT_DIR: checkpoints, log.txt, metrics.json, TensorBoard events, predictions under inference/
and, last, results.json; with --eval-only, where OUTPUT_DIR is a training's, to OUTPUT_DIR/evaluation.
Datasets are looked for under $DETECTRON2_DATASETS (datasets/README.md).

examples:
  tools/train_net.py --config-file configs/robust_r50_eps3.yaml --num-gpus 8
  tools/train_net.py --config-file configs/robust_r50_eps3.yaml MODEL.WEIGHTS mine.pkl SOLVER.BASE_LR 0.01
  tools/train_net.py --config-file configs/robust_r50_eps3.yaml --resume
  tools/train_net.py --config-file configs/robust_r50_eps3.yaml --eval-only MODEL.WEIGHTS model_final.pth
"""

import argparse
import time

import _environment  # noqa: F401  (first, since it checks this Python)
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

import rt_detectron  # noqa: F401  (registers the backbones)
from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.data import check_datasets
from rt_detectron.detection import Trainer, load_detector_config
from rt_detectron.engine.launch import launch
from rt_detectron.engine.loop import folder_of_evaluation, refuse_other_training, sole_run
from rt_detectron.engine.setup import save_config, set_up
from rt_detectron.evaluation.build import check_test_sets
from rt_detectron.evaluation.results import write_results
from rt_detectron.utils.errors import one_line_errors


def main(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    cfg = load_detector_config(args.config_file, args.opts)
    check_datasets([*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST])
    training = cfg.OUTPUT_DIR
    if args.eval_only:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = folder_of_evaluation(training)
        cfg.freeze()
    with sole_run(cfg.OUTPUT_DIR, "OUTPUT_DIR"):
        results, iterations = evaluate(cfg, training, args) if args.eval_only else train(cfg, args)
        if comm.is_main_process():
            print("Wrote", write_results(cfg, results, time.perf_counter() - start, iterations))


def train(cfg: CfgNode, args: argparse.Namespace) -> tuple[dict, int]:
    refuse_other_training(cfg.OUTPUT_DIR, args.resume, "OUTPUT_DIR")
    set_up(args, cfg.OUTPUT_DIR, cfg.SEED, cfg.CUDNN_BENCHMARK)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    save_config(cfg.dump(), cfg.OUTPUT_DIR)
    trainer.train()
    return trainer._last_eval_results, trainer.max_iter


def evaluate(cfg: CfgNode, training: str, args: argparse.Namespace) -> tuple[dict, int]:
    """``training``: the folder of the checkpoint that --resume evaluates."""
    set_up(args, cfg.OUTPUT_DIR, cfg.SEED)
    check_test_sets(cfg)
    model = Trainer.build_model(cfg)
    checkpointer = RobustCheckpointer(model, training, trained=True, input_format=cfg.INPUT.FORMAT)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_tta(cfg, model))
    save_config(cfg.dump(), cfg.OUTPUT_DIR)
    return results, 0


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    args = parser.parse_args()
    with one_line_errors():
        launch(main, args)
