#!/usr/bin/env python
"""Train and evaluate a detector from a LazyConfig, as Detectron2's own lazyconfig_train_net.py.

Takes ours (configs/lazy) and Detectron2's. Writes to train.output_dir what tools/train_net.py writes:
checkpoints, log.txt, metrics.json, TensorBoard events, predictions under inference/ and, last, results.json.

examples:
  tools/lazyconfig_train_net.py --config-file configs/lazy/mask_rcnn_robust_r50_eps3.py --num-gpus 8
  tools/lazyconfig_train_net.py --config-file ... model.backbone.name=mine.pkl train.ema=0.999
  tools/lazyconfig_train_net.py --config-file ... --resume
  tools/lazyconfig_train_net.py --config-file ... --eval-only train.init_checkpoint=output/model_final.pth
"""

import argparse
import time

import _environment  # noqa: F401  (first, since it checks this Python)
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from rt_detectron.checkpoint.checkpointer import RobustCheckpointer
from rt_detectron.detection import build_lazy_model, do_test, do_train, load_lazy_config, write_lazy_results
from rt_detectron.detection.lazy_data import check_lazy_test_set
from rt_detectron.engine.launch import launch
from rt_detectron.engine.lazy_config import save_lazy_config
from rt_detectron.engine.loop import folder_of_evaluation, refuse_other_training, sole_run
from rt_detectron.engine.setup import set_up
from rt_detectron.utils.errors import one_line_errors


def main(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    cfg = load_lazy_config(args.config_file, args.opts)
    if args.eval_only:
        cfg.train.output_dir = folder_of_evaluation(cfg.train.output_dir)
    with sole_run(cfg.train.output_dir):
        results, iterations = evaluate(cfg, args) if args.eval_only else train(cfg, args)
        if comm.is_main_process():
            print("Wrote", write_lazy_results(cfg, results, time.perf_counter() - start, iterations))


def train(cfg, args: argparse.Namespace) -> tuple[dict, int]:
    folder = cfg.train.output_dir
    refuse_other_training(folder, args.resume)
    set_up(args, folder, cfg.train.get("seed", -1), cfg.train.get("cudnn_benchmark", False))
    return do_train(cfg, args.resume), cfg.train.max_iter


def evaluate(cfg, args: argparse.Namespace) -> tuple[dict, int]:
    set_up(args, cfg.train.output_dir, cfg.train.get("seed", -1))
    check_lazy_test_set(cfg)
    model = build_lazy_model(cfg)
    RobustCheckpointer(model, trained=True).load(cfg.train.init_checkpoint)
    results = do_test(cfg, model)
    save_lazy_config(cfg, cfg.train.output_dir)
    return results, 0


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    args = parser.parse_args()
    with one_line_errors():
        launch(main, args)
