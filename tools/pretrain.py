#!/usr/bin/env python
"""Train an ImageNet-style classifier, standard or adversarially, on Detectron2's engine.

Writes to train.output_dir: classifier.pth, backbone.pkl for Detectron2, model_card.md, checkpoints for
--resume, metrics.json, TensorBoard events and log.txt. Several GPUs or machines: --num-gpus and
--num-machines, or torchrun. SIGTERM and Ctrl-C write a checkpoint first.

examples:
  tools/pretrain.py --config-file configs/pretrain/resnet50_l2_eps3.py --num-gpus 8
  torchrun --nproc-per-node 8 tools/pretrain.py --config-file configs/pretrain/resnet50_l2_eps3.py
  tools/pretrain.py --config-file configs/pretrain/resnet18_l2_eps0_5_cifar10.py \\
      dataloader.train.dataset.urls='shards/cifar10-train-*.tar.gz' train.epochs=10
  tools/pretrain.py --config-file ... --resume
  tools/pretrain.py --config-file ... --eval-only train.init_checkpoint=output/classifier.pth
"""

import argparse

import _environment  # noqa: F401  (first, since it checks this Python)
from detectron2.engine import default_argument_parser

from rt_detectron.engine.launch import launch
from rt_detectron.engine.loop import sole_run
from rt_detectron.engine.setup import set_up
from rt_detectron.modeling.load import load_weights
from rt_detectron.pretrain.recipe import load_pretrain_config
from rt_detectron.pretrain.trainer import build_model, do_eval, do_train
from rt_detectron.utils.errors import InputError, one_line_errors


def main(args: argparse.Namespace) -> None:
    cfg = load_pretrain_config(args.config_file, args.opts)
    with sole_run(cfg.train.output_dir):
        set_up(args, cfg.train.output_dir, cfg.train.seed, cfg.train.get("cudnn_benchmark", False))
        if not args.eval_only:
            do_train(cfg, resume=args.resume)
            return
        if not cfg.train.init_checkpoint:
            raise InputError("--eval-only needs weights: add train.init_checkpoint=FILE")
        model = build_model(cfg)
        load_weights(model.classifier, cfg.train.init_checkpoint)
        do_eval(cfg, model)


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    args = parser.parse_args()
    with one_line_errors():
        launch(main, args)
