#!/usr/bin/env python
"""Measure a classifier's accuracy on clean and on attacked images, and check for gradient masking.

Images, network and threat model are those of the recipe. Writes evaluation.json, evaluation.md and
eps_curve.png to --output. After each batch, what was found is kept there, in measurements-*.jsonl: the same
command goes on after an interruption, and runs only what is missing for more --images or --attacks.

attacks, separated by commas:
  pgd20       20 steps from the image
  pgd100x5    100 steps, the strongest result of 5 random starts
  autoattack  AutoAttack's standard ensemble; hours on a CPU. Of fewer than 4 classes it
              leaves out APGD-DLR, which needs 4. Needs: pip install pyautoattack

examples:
  tools/evaluate_classifier.py --config-file configs/pretrain/resnet50_l2_eps3.py \\
      --weights output/pretrain/classifier.pth --images 5000 --num-gpus 8
  tools/evaluate_classifier.py --config-file configs/pretrain/resnet18_l2_eps0_5_cifar10.py \\
      --weights classifier.pth --attacks pgd20,pgd100x5 --images 1000 threat_model.eps=1.0
"""

import argparse
import os

import _environment  # noqa: F401  (first, since it checks this Python)
from detectron2.engine import default_argument_parser

from rt_detectron.engine.launch import launch
from rt_detectron.engine.lazy_config import save_lazy_config
from rt_detectron.engine.loop import sole_run
from rt_detectron.engine.setup import set_up
from rt_detectron.pretrain.evaluation import evaluate_classifier
from rt_detectron.pretrain.recipe import load_pretrain_config
from rt_detectron.utils.errors import one_line_errors


def main(args: argparse.Namespace) -> None:
    cfg = load_pretrain_config(args.config_file, args.opts)
    cfg.train.output_dir = args.output or f"{os.path.splitext(args.weights)[0]}_evaluation"
    with sole_run(cfg.train.output_dir, "--output"):
        set_up(args, cfg.train.output_dir, cfg.train.seed, cfg.train.get("cudnn_benchmark", False))
        evaluate_classifier(cfg, args.weights, args.attacks.split(","), args.images)
        save_lazy_config(cfg, cfg.train.output_dir)


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument("--weights", required=True, help="the classifier: .pth, .ckpt or .safetensors")
    parser.add_argument(
        "--attacks",
        default="pgd20,pgd100x5,autoattack",
        help="names of attacks, separated by commas (default: %(default)s)",
    )
    parser.add_argument(
        "--images", type=int, default=1000, help="number of test images, evenly spaced (default: 1000)"
    )
    parser.add_argument("--output", help="folder of the results; default: WEIGHTS_evaluation")
    args = parser.parse_args()
    with one_line_errors():
        launch(main, args)
