#!/usr/bin/env python
"""Draw what detectors find in pictures and videos: boxes and masks, several detectors side by side.

Repeat --weights for each detector, and --config-file if the configs differ. Pictures are written as JPEG or
PNG, videos as MP4 without sound. Exit status: 0 if all were written, 1 if some were not (one line each), 2
for wrong arguments.

examples:
  tools/demo.py --config-file configs/robust_r50_eps3.yaml --weights output/robust/model_final.pth \\
      --input photos/ film.mp4 --output output/demo
  tools/demo.py --config-file configs/standard_r50_eps0.yaml --weights output/standard/model_final.pth \\
      --config-file configs/robust_r50_eps3.yaml --weights output/robust/model_final.pth \\
      --caption standard --caption robust --input 'photos/*.jpg' --output output/demo MODEL.DEVICE cpu
"""

import argparse
import sys

import _environment  # noqa: F401  (first, since it checks this Python)
import numpy as np
from PIL import Image

import rt_detectron  # noqa: F401  (registers the backbones)
from rt_detectron.detection import load_predictors
from rt_detectron.utils.errors import InputError, one_line_errors
from rt_detectron.visualization.detections import detected_instances, side_by_side
from rt_detectron.visualization.media import annotate_files, find_media, output_paths


def main(args: argparse.Namespace) -> int:
    sources, problems = find_media(args.input)
    if not sources:
        raise InputError("; ".join(problems))
    outputs = output_paths(sources, args.output)
    detectors = load_predictors(args.config_file, args.weights, args.caption, args.threshold, args.opts)

    def annotate(image: Image.Image) -> Image.Image:
        bgr = np.asarray(image)[:, :, ::-1]  # Detectron2's predictor takes BGR, whatever INPUT.FORMAT is
        found = [
            detected_instances(detector(bgr), detector.class_names, args.threshold)
            for detector in detectors.values()
        ]
        return side_by_side(image, found, list(detectors))

    problems += annotate_files(zip(sources, outputs, strict=True), annotate)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, action="append", metavar="FILE", help="one, or one per --weights")
    add("--weights", action="append", metavar="FILE", help="a trained detector (default: the config's)")
    add("--caption", action="append", metavar="TEXT", help="a detector's name above its pictures")
    add("--input", required=True, nargs="+", metavar="PATH", help="pictures, videos, folders, patterns")
    add("--output", required=True, metavar="DIR", help="folder to write to; the inputs' names are kept")
    add("--threshold", type=float, default=0.5, metavar="SCORE", help="lowest score drawn (%(default)s)")
    add(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="config keys of all detectors; must come last",
    )
    args = parser.parse_args()
    with one_line_errors():
        sys.exit(main(args))
