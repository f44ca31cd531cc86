#!/usr/bin/env python
"""Evaluate a detector on clean, attacked and corrupted images of DATASETS.TEST.

Config keys, in the config file or after the options, say what to measure:

{keys}
  TEST.PICTURES 4                            pictures of this many images, before and after each change

Writes OUTPUT_DIR/robustness.json once everything is measured, prints a table, and puts all other files into
OUTPUT_DIR/robustness. What is finished there is not measured again: an interrupted run goes on with the next
image, and one more eps measures that one only. (--resume changes nothing.)

examples:
  tools/evaluate_robustness.py --config-file configs/robust_r50_eps3.yaml --num-gpus 8 \\
      MODEL.WEIGHTS output/model_final.pth TEST.ATTACK.LINF_EPS "[1,2,4,8]" TEST.ATTACK.MAX_IMAGES 500
  tools/evaluate_robustness.py --config-file configs/robust_r50_eps3.yaml \\
      MODEL.WEIGHTS output/model_final.pth TEST.CORRUPTION.NAMES "['common']"
"""

import argparse

import _environment  # noqa: F401  (first, since it checks this Python)
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

import rt_detectron  # noqa: F401  (registers the backbones)
from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.data import check_datasets
from rt_detectron.detection import Trainer, load_detector_config
from rt_detectron.engine.launch import launch
from rt_detectron.engine.loop import sole_run
from rt_detectron.engine.setup import save_config, set_up
from rt_detectron.evaluation.build import check_test_sets
from rt_detectron.evaluation.robustness import (
    evaluate_robustness,
    keys_help,
    robustness_config,
    robustness_evaluations,
    robustness_table,
)
from rt_detectron.utils.errors import one_line_errors


def main(args: argparse.Namespace) -> None:
    cfg = load_detector_config(args.config_file, args.opts)
    robustness_evaluations(cfg)  # reports mistakes before anything is loaded
    check_datasets(cfg.DATASETS.TEST)
    own = robustness_config(cfg)
    with sole_run(own.OUTPUT_DIR, "OUTPUT_DIR"):
        set_up(args, own.OUTPUT_DIR, cfg.SEED, cfg.CUDNN_BENCHMARK)
        check_test_sets(cfg)
        model = Trainer.build_model(cfg)
        RobustCheckpointer(model, trained=True, input_format=cfg.INPUT.FORMAT).load(cfg.MODEL.WEIGHTS)
        surrogate = None
        if cfg.TEST.ATTACK.SURROGATE:
            surrogate = Trainer.build_model(cfg)
            checkpointer = RobustCheckpointer(surrogate, trained=True, input_format=cfg.INPUT.FORMAT)
            checkpointer.load(cfg.TEST.ATTACK.SURROGATE)
        content = evaluate_robustness(cfg, model, surrogate)
        save_config(own.dump(), own.OUTPUT_DIR)
        if comm.is_main_process():
            print(robustness_table(content))
            print(f"Wrote {cfg.OUTPUT_DIR}/robustness.json")


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__.format(keys=keys_help()))
    args = parser.parse_args()
    with one_line_errors():
        launch(main, args)
