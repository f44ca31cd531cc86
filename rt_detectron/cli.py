"""The command ``rt-detectron``: all tools under one name, for who installed a wheel."""

import runpy
import sys

from rt_detectron.utils.errors import did_you_mean
from rt_detectron.utils.files import shipped

# Command -> tool, and what it does.
COMMANDS = {
    "pretrain": ("pretrain", "train an ImageNet classifier, standard or adversarially"),
    "evaluate-classifier": ("evaluate_classifier", "measure a classifier's accuracy, clean and under attack"),
    "convert": ("convert_checkpoint", "turn a classifier into a Detectron2 backbone, or into another format"),
    "train": ("train_net", "fine-tune a detector from a YAML config"),
    "lazy-train": ("lazyconfig_train_net", "fine-tune a detector from a LazyConfig"),
    "evaluate-robustness": ("evaluate_robustness", "measure a detector's AP, clean, attacked and corrupted"),
    "compare": ("compare", "run a study: several backbones, several seeds, one report"),
    "transfer": ("transfer", "transfer a classifier to another data set"),
    "demo": ("demo", "draw what detectors find in pictures and videos"),
}


def main() -> None:
    """Run the tool that the first argument names, in this process, with the other arguments."""
    command, arguments = (*sys.argv[1:2], *["--help"])[0], sys.argv[2:]
    if command in ("-h", "--help"):
        print(usage())
        return
    if command not in COMMANDS:
        print(
            f"error: rt-detectron has no command {command!r}{did_you_mean(command, COMMANDS)}; "
            f"it has {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        raise SystemExit(2)
    tools = shipped("tools")
    sys.path.insert(0, str(tools))  # as Python does for a script
    sys.argv = [f"rt-detectron {command}", *arguments]
    # Under the name of a script, so that the processes a tool starts can find its functions.
    runpy.run_path(str(tools / f"{COMMANDS[command][0]}.py"), run_name="__main__")


def usage() -> str:
    """What ``rt-detectron --help`` prints."""
    lines = [f"  {command:<20} {what}" for command, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rt-detectron COMMAND [OPTIONS]",
            "",
            "Adversarially robust backbones for Detectron2.",
            "",
            *lines,
            "",
            "rt-detectron COMMAND --help explains a command. Shipped configs go by name, in any folder:",
            "rt-detectron train --config-file robust_r50_eps3.yaml",
        ]
    )
