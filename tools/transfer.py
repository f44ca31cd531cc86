#!/usr/bin/env python
"""Transfer a pretrained classifier to another data set: its last layer alone, or the whole network.

The recipe (configs/transfer) is that of Salman et al. 2020. Writes to train.output_dir: results.json, the
accuracies; predictions.json; classifier.pth; metrics.json, log.txt and config.yaml. Features of
fixed_feature are cached, so only the first of several runs computes them. docs/transfer.md is the guide;
datasets/README.md has the names of the data sets and the folders they are expected in.

examples:
  tools/transfer.py --config-file configs/transfer/fixed_feature.py weights=resnet50_l2_eps3 \\
      dataset.name=pets dataset.download=true optimizer.lr=0.01 train.output_dir=output/pets
  tools/transfer.py --config-file configs/transfer/full_network.py --num-gpus 8 --resume \\
      weights=output/pretrain/classifier.pth dataset.name=cifar10 train.seed=1 train.amp=bf16
  tools/transfer.py --config-file configs/transfer/fixed_feature.py weights=resnet18_l2_eps0 \\
      dataset.name=folder dataset.root=my_images head.solver=logistic_regression
  tools/transfer.py --config-file configs/transfer/fixed_feature.py dataset.name=dtd dataset.held_out=true \\
      weights=convnext.pth arch=timm/convnext_tiny optimizer.lr=0.001    # tested on held-out training images
"""

import argparse

import _environment  # noqa: F401  (first, since it checks this Python)
from detectron2.engine import default_argument_parser

from rt_detectron.engine.launch import launch
from rt_detectron.engine.lazy_config import save_lazy_config
from rt_detectron.engine.loop import sole_run
from rt_detectron.engine.setup import set_up
from rt_detectron.transfer.recipe import load_transfer_config
from rt_detectron.transfer.trainer import do_transfer, is_finished
from rt_detectron.utils.errors import one_line_errors


def main(args: argparse.Namespace) -> None:
    cfg = load_transfer_config(args.config_file, args.opts)
    with sole_run(cfg.train.output_dir):
        if is_finished(cfg, args.resume):
            print(f"{cfg.train.output_dir}/results.json exists: nothing to do")
            return
        set_up(args, cfg.train.output_dir, cfg.train.seed, cfg.train.get("cudnn_benchmark", False))
        do_transfer(cfg, resume=args.resume)
        save_lazy_config(cfg, cfg.train.output_dir)


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    args = parser.parse_args()
    with one_line_errors():
        launch(main, args)
