#!/usr/bin/env python
"""Draw what detectors find in pictures and videos: boxes and masks, several detectors side by side.

Repeat --weights for each detector, and --config-file if the configs differ. Pictures are written as JPEG or
PNG, videos as MP4 without sound. With --explain, a picture becomes a row for each detector: its detections,
the gradient of their scores, and an image made from the backbone's features alone. Exit status: 0 if all were
written, 1 if some were not (one line each), 2 for wrong arguments.

examples:
  tools/demo.py --config-file configs/robust_r50_eps3.yaml --weights output/robust/model_final.pth \\
      --input photos/ film.mp4 --output output/demo
  tools/demo.py --config-file configs/standard_r50_eps0.yaml --weights output/standard/model_final.pth \\
      --config-file configs/robust_r50_eps3.yaml --weights output/robust/model_final.pth \\
      --caption standard --caption robust --input 'photos/*.jpg' --output output/demo MODEL.DEVICE cpu
  tools/demo.py --config-file output/standard/config.yaml --weights output/standard/model_final.pth \\
      --config-file output/robust/config.yaml --weights output/robust/model_final.pth \\
      --caption standard --caption robust --input photo.jpg --output output/explain \\
      --explain INPUT.MIN_SIZE_TEST 320
"""

import argparse
import sys

import _environment  # noqa: F401  (first, since it checks this Python)
import numpy as np
from PIL import Image

import rt_detectron  # noqa: F401  (registers the backbones)
from rt_detectron.detection import Predictor, load_predictors
from rt_detectron.detection.explain import STEPS, find_feature, input_gradient, invert_features
from rt_detectron.utils.errors import InputError, one_line_errors
from rt_detectron.visualization.detections import detected_instances, side_by_side
from rt_detectron.visualization.explanations import Explanation, explained
from rt_detectron.visualization.media import annotate_files, find_media, is_video, output_paths


def main(args: argparse.Namespace) -> int:
    if not args.explain and (args.feature, args.steps) != (None, None):
        raise InputError("--feature and --steps are for --explain: give it, too")
    if args.steps is not None and args.steps < 1:
        raise InputError(f"--steps {args.steps}: give at least 1")
    sources, problems = find_media(args.input)
    if args.explain:
        videos = [source for source in sources if is_video(source)]
        problems += [f"{video}: --explain takes pictures, not videos" for video in videos]
        sources = [source for source in sources if source not in videos]
    if not sources:
        raise InputError("; ".join(problems))
    outputs = output_paths(sources, args.output)
    detectors = load_predictors(args.config_file, args.weights, args.caption, args.threshold, args.opts)
    for detector in detectors.values():
        find_feature(detector, args.feature)  # refuses a wrong name before anything is computed

    def annotate(image: Image.Image) -> Image.Image:
        bgr = np.asarray(image)[:, :, ::-1]  # Detectron2's predictor takes BGR, whatever INPUT.FORMAT is
        if args.explain:
            return explained(image, {name: explain(each, bgr, args) for name, each in detectors.items()})
        found = [
            detected_instances(detector(bgr), detector.class_names, args.threshold)
            for detector in detectors.values()
        ]
        return side_by_side(image, found, list(detectors))

    problems += annotate_files(zip(sources, outputs, strict=True), annotate)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def explain(detector: Predictor, bgr: np.ndarray, args: argparse.Namespace) -> Explanation:
    found, gradient = input_gradient(detector, bgr, args.threshold)
    inversion = invert_features(detector, bgr, args.feature, args.steps or STEPS)
    return Explanation(
        detected_instances(found, detector.class_names, args.threshold),
        gradient.permute(1, 2, 0).numpy(),
        inversion.image.permute(1, 2, 0).numpy(),
        inversion.feature,
        inversion.end,
    )


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
    add("--explain", action="store_true", help="draw the scores' gradient and an image made from features")
    add("--feature", metavar="NAME", help="what --explain makes an image from (default: res5 or the like)")
    add("--steps", type=int, metavar="N", help=f"steps towards that image (default: {STEPS})")
    add(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="config keys of all detectors; must come last",
    )
    args = parser.parse_args()
    with one_line_errors():
        sys.exit(main(args))
