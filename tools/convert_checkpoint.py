#!/usr/bin/env python
"""Convert a classifier into a Detectron2 backbone, or into another of the formats that it comes in.

With --detector, convert a Faster R-CNN of mmdetection into a detector of Detectron2.

python tools/convert_checkpoint.py resnet50_l2_eps3.ckpt resnet50_l2_eps3.pkl
python tools/convert_checkpoint.py output/pretrain/classifier.pth resnet50_l2_eps3.safetensors
python tools/convert_checkpoint.py frcnn_at.pth detector.pth --detector
"""

import argparse

import _environment  # noqa: F401  (first, since it checks this Python)

from rt_detectron.checkpoint.architectures import ARCHITECTURES, RESNET, get_architecture
from rt_detectron.checkpoint.convert import UNIT_PIXELS, Conversion, convert_checkpoint
from rt_detectron.checkpoint.layouts import Choice
from rt_detectron.checkpoint.metadata import INPUT_FORMATS, NORMS
from rt_detectron.checkpoint.mmdetection import DetectorConversion, convert_detector
from rt_detectron.checkpoint.preprocessing import preprocessing_lines
from rt_detectron.checkpoint.statements import Pixels
from rt_detectron.utils.errors import InputError, one_line_errors


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="No code in the input is ever run. Every conversion keeps the weights bit by bit but for "
        "--input-format BGR and for half precision, which becomes float32.",
    )
    parser.add_argument(
        "input",
        help="robustness .ckpt, torchvision or timm .pth, .pth.tar of PyTorch's ImageNet example "
        "(Stylized-ImageNet), .safetensors, output of tools/pretrain.py, or a .pkl written by this tool; the "
        "network is found wherever it is in the file",
    )
    parser.add_argument(
        "output",
        help=".pkl (Detectron2 backbone, for MODEL.WEIGHTS), .pth (torchvision), .ckpt (robustness) "
        "or .safetensors",
    )
    parser.add_argument(
        "--arch",
        help=f"default: detected; one of {', '.join(ARCHITECTURES)}, or timm/NAME, which is never detected; "
        "timm/NAME:act_layer=gelu for one with other layers",
    )
    parser.add_argument(
        "--detector",
        action="store_true",
        help="the input is a Faster R-CNN with FPN of mmdetection 2 or 3, on a ResNet or ConvNeXt-T, such as "
        "those of thu-ml/oddefense; the output, a .pth, is the whole detector",
    )
    parser.add_argument("--norm", choices=NORMS, help="default: from the file's metadata or name")
    parser.add_argument("--eps", type=float, help="L2 in [0,1] pixel units, Linf in 1/255")
    parser.add_argument(
        "--input-format",
        choices=INPUT_FORMATS,
        default="RGB",
        help="BGR: the stem absorbs Detectron2's default preprocessing (BGR, std 1)",
    )
    parser.add_argument("--key", help="where in the file the weights are, such as state_dict_ema or teacher")
    parser.add_argument("--prefix", help="what stands before the network's names, such as module.encoder_q.")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="read weights averaged over the training, or those that are not (default: averaged, if any)",
    )
    for key in ("mean", "std"):
        parser.add_argument(
            f"--pixel-{key}",
            nargs="+",
            metavar="NUMBER",
            help=f"RGB in 0..255, as in MODEL.PIXEL_{key.upper()}; default: what the file says, or else the "
            "network's usual; none: the network takes images in [0, 1] as they are",
        )
    return parser.parse_args(argv)


def pixels(args: argparse.Namespace) -> Pixels | None:
    """What --pixel-mean and --pixel-std say.

    Raises:
        InputError: for one without the other, and for what are not three numbers in 0..255.
    """
    given = [args.pixel_mean, args.pixel_std]
    if given == [None, None]:
        return None
    if all(numbers in (None, ["none"]) for numbers in given):
        return UNIT_PIXELS
    try:
        mean, std = (tuple(float(number) for number in numbers) for numbers in given)
    except (TypeError, ValueError):
        mean = std = ()
    if len(mean) != 3 or len(std) != 3 or 0 < max(mean) <= 1:
        raise InputError(
            "--pixel-mean and --pixel-std go together, three numbers in 0..255 each (such as 123.675 116.28 "
            "103.53 and 58.395 57.12 57.375), or none"
        )
    return mean, std


def print_summary(args: argparse.Namespace, conversion: Conversion) -> None:
    metadata = conversion.metadata
    training = "training unknown" if metadata.eps is None else f"eps {metadata.eps:g}"
    training = f"{metadata.norm} {training}" if metadata.norm else training
    print(f"read   {args.input}: {metadata.arch}, {training}, sha256 {metadata.sha256}")
    for remark in conversion.remarks:
        print(f"       {remark}")
    for guess in conversion.guesses:
        print(f"guess  {guess}")
    print(f"wrote  {args.output}: {conversion.num_tensors} tensors")
    if args.output.endswith(".pkl"):
        architecture = get_architecture(metadata.arch)
        print("Config lines for it, under FPN:")
        print(f'  MODEL.WEIGHTS "{args.output}"')
        print(f'  MODEL.BACKBONE.NAME "{architecture.builder("fpn")}"')
        print(f'  MODEL.ROBUST.ARCH "{metadata.arch}"')
        for key, line in preprocessing_lines(metadata).items():
            if architecture.family is RESNET or key != "MODEL.RESNETS.STRIDE_IN_1X1":
                print(f"  {line}")


def print_detector(args: argparse.Namespace, conversion: DetectorConversion) -> None:
    metadata = conversion.metadata
    print(f"read   {args.input}: Faster R-CNN, {metadata.arch}, {conversion.classes} classes")
    for guess in conversion.guesses:
        print(f"guess  {guess}")
    print(f"wrote  {args.output}: {conversion.num_tensors} tensors")
    print("Config lines for it, in a config of Faster R-CNN with FPN:")
    for key, value in conversion.config.items():
        print(f"  {key} {value}")
    for line in preprocessing_lines(metadata).values():
        print(f"  {line}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors():
        if args.detector:
            print_detector(args, convert_detector(args.input, args.output, args.norm, args.eps, args.arch))
            return
        conversion = convert_checkpoint(
            args.input,
            args.output,
            args.arch,
            args.norm,
            args.eps,
            args.input_format,
            Choice(args.key, args.prefix, args.ema),
            pixels(args),
        )
        print_summary(args, conversion)


if __name__ == "__main__":
    main()
