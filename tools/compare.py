#!/usr/bin/env python
"""Compare backbones: run the trainings of a study, then write report.html and its numbers as files.

Trials run in parallel with Ray, on this machine or on a cluster. Each has its own processes and its own
folder under OUTPUT/trials. A finished trial never runs again, so the same command continues where it stopped.
If nothing is left to run, it writes the report again.
Exit status: 0 all trials have results, 1 some are missing, 2 wrong input, 130 stopped.
"""

import argparse
import shlex
import signal
import sys
from pathlib import Path

from _packages import require, without

# First, since it checks this Python. A report of what is finished needs neither of what trials need.
require("rt_detectron", *(() if "--report" in sys.argv else ("torch", "detectron2")))
with without("detectron2"):  # only the trials' own processes need it, and it takes seconds to load with torch
    import rt_detectron  # noqa: F401

from rt_detectron.study.evaluations import compared  # noqa: E402
from rt_detectron.study.grid import Study  # noqa: E402
from rt_detectron.study.load import load_study, trials_only  # noqa: E402
from rt_detectron.study.power import describe_power  # noqa: E402
from rt_detectron.study.record import (  # noqa: E402
    Outcome,
    check_name,
    output_folder,
    remove_leftovers,
    with_copied_configs,
)
from rt_detectron.study.report import terminal_table, write_report  # noqa: E402
from rt_detectron.study.run import describe, import_ray, missing_trials, run_study  # noqa: E402
from rt_detectron.study.saved import save_study, saved_study  # noqa: E402
from rt_detectron.study.selection import finished_outcomes  # noqa: E402
from rt_detectron.utils.errors import one_line_errors  # noqa: E402

TOOLS = Path(__file__).resolve().parent


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", metavar="FILE", help="e.g. configs/study/demo.yaml")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the trials and the report")
    parser.add_argument(
        "--resume", action="store_true", help="accepted for scripts; a study always runs only what is missing"
    )
    parser.add_argument(
        "--ray-address",
        metavar="A",
        help="address of a Ray cluster, such as auto or 10.0.0.1:6379; --output, this repository, the files "
        "of the study and the data must then have the same paths on all machines, on a shared file system",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="KEY=NAME,...",
        help="run only these trials, e.g. arm=standard,arm=l2_eps3,target=person; keys: arm, target, stage",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="only write the report of what is finished in --output, also beside a running study; needs "
        "neither --study nor Ray, weights or data",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print trials, commands, and the estimated time and disk use; run nothing",
    )
    parser.add_argument(
        "--resolve",
        type=float,
        metavar="D",
        help="with --dry-run: how many seeds tell a difference of D points from 0, by the finished trials",
    )
    parser.add_argument("--sd", type=float, metavar="S", help="with --resolve: of one run, instead of theirs")
    args = parser.parse_args(argv)
    if not args.study and not args.report:
        parser.error("the following arguments are required: --study")
    if args.resolve is not None and not args.dry_run:
        parser.error("--resolve goes with --dry-run")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    output = Path(args.output)
    check_name(output)
    if args.report:
        study, outcomes, command = saved_study(output)
        return report(study, outcomes, output, command)
    import_ray()  # first, so that a missing Ray is reported at once
    study, notes = with_copied_configs(load_study(args.study), output, make=False)
    print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)
    only = trials_only(study, args.only)
    if args.dry_run:
        print(describe(study, output, TOOLS, args.ray_address))
        if args.resolve is not None:
            finished = list(finished_outcomes(study, output).values())
            print(*describe_power(study, finished, args.resolve, args.sd), sep="\n")
        return 0
    address = ["--ray-address", args.ray_address] if args.ray_address else []
    command = shlex.join(
        ["python", "tools/compare.py", "--study", args.study, "--output", args.output, *address]
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with output_folder(output):
            remove_leftovers(output)
            study, _ = with_copied_configs(study, output, make=True)
            save_study(study, output, command)
            outcomes = run_study(study, output, TOOLS, args.ray_address, only)
            return report(study, outcomes, output, command)
    except KeyboardInterrupt:
        print(f"stopped; continue with: {command} --resume", file=sys.stderr)
        return 130


def report(study: Study, outcomes: list[Outcome], output: Path, command: str) -> int:
    """Write the report, and print its table and what is missing. Gives the exit status."""
    comparison = compared(study, outcomes)
    page = write_report(comparison, output, command)
    missing, reasons = missing_trials(study, outcomes)
    print(*reasons, sep="\n", end="\n" if reasons else "", file=sys.stderr)
    if missing:
        print(f"missing trials: {missing}; run them with: {command} --resume", file=sys.stderr)
    print(terminal_table(comparison.scores))
    print(page, flush=True)
    return 1 if missing else 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
