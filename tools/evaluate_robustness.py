#!/usr/bin/env python
"""Measure a detector's AP on clean, on attacked and on corrupted images of DATASETS.TEST.

What is measured is asked for by keys, of the config file or behind the options:

  TEST.ATTACK.LINF_EPS "[1,2,4]"     PGD on the detector's input, Linf, eps in units of 1/255
  TEST.ATTACK.L2_EPS "[0.5,1]"       the same with L2, for images in [0, 1] after resizing
  TEST.ATTACK.STEPS 10, TEST.ATTACK.RESTARTS 1
  TEST.ATTACK.LOSSES "['all']"       what it raises: classification, localization, mask, all, vanishing
  TEST.CORRUPTION.NAMES "['common']" the 15 common corruptions; or 'all' (15 + 4), or names as 'fog'
  TEST.CORRUPTION.SEVERITIES "[1,2,3,4,5]"
  TEST.ATTACK.MAX_IMAGES 100, TEST.CORRUPTION.MAX_IMAGES 100     a quick look at that many images
  TEST.PICTURES 4                    before/after pictures of so many images, for each of these

Writes OUTPUT_DIR/robustness.json, which is there only when all is measured, prints a table, and puts the rest
into OUTPUT_DIR/robustness. With --resume, what an interrupted run of the same config and weights has measured
is not measured again.

examples:
  tools/evaluate_robustness.py --config-file configs/robust_r50_eps3.yaml --num-gpus 8 \\
      MODEL.WEIGHTS output/model_final.pth TEST.ATTACK.LINF_EPS "[1,2,4,8]" TEST.ATTACK.MAX_IMAGES 500
  tools/evaluate_robustness.py --config-file configs/robust_r50_eps3.yaml --resume \\
      MODEL.WEIGHTS output/model_final.pth TEST.CORRUPTION.NAMES "['common']"
"""

import argparse

import _environment  # noqa: F401  (first, since it checks this Python)
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

import rt_detectron  # noqa: F401  (registers the backbones)
from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.data import check_datasets
from rt_detectron.detection import Trainer, load_detector_config
from rt_detectron.engine.launch import launch
from rt_detectron.evaluation.robustness.evaluate import (
    evaluate_robustness,
    robustness_config,
    robustness_table,
)
from rt_detectron.evaluation.robustness.plan import robustness_plan
from rt_detectron.utils.errors import one_line_errors


def main(args: argparse.Namespace) -> None:
    cfg = load_detector_config(args.config_file, args.opts)
    robustness_plan(cfg)  # a mistake is better told before anything is loaded
    check_datasets(cfg.DATASETS.TEST)
    own = robustness_config(cfg)
    default_setup(own, args)
    setup_logger(own.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="rt_detectron")
    model = Trainer.build_model(cfg)
    RobustCheckpointer(model, own.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    content = evaluate_robustness(cfg, model, resume=args.resume)
    if comm.is_main_process():
        print(robustness_table(content))
        print(f"Wrote {cfg.OUTPUT_DIR}/robustness.json")


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    args = parser.parse_args()
    with one_line_errors():
        launch(main, args)
