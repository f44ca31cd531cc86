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

import _environment  # noqa: F401  (first, since it checks this Python)

from rt_detectron.study.evaluations import compared
from rt_detectron.study.load import load_study
from rt_detectron.study.record import output_folder
from rt_detectron.study.report import terminal_table, write_report
from rt_detectron.study.run import describe, import_ray, missing_trials, run_study
from rt_detectron.utils.errors import one_line_errors

TOOLS = Path(__file__).resolve().parent


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", required=True, metavar="FILE", help="e.g. configs/study/demo.yaml")
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
        "--dry-run", action="store_true", help="print trials, commands and the estimated time; run nothing"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    output = Path(args.output)
    import_ray()  # first, so that a missing Ray is reported at once
    study = load_study(args.study)
    if args.dry_run:
        print(describe(study, output, TOOLS, args.ray_address))
        return 0
    address = ["--ray-address", args.ray_address] if args.ray_address else []
    command = shlex.join(
        ["python", "tools/compare.py", "--study", args.study, "--output", args.output, *address]
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with output_folder(output):
            outcomes = run_study(study, output, TOOLS, args.ray_address)
            comparison = compared(study, outcomes)
            report = write_report(comparison, output, command)
    except KeyboardInterrupt:
        print(f"stopped; continue with: {command} --resume", file=sys.stderr)
        return 130
    missing, reasons = missing_trials(study, outcomes)
    print(*reasons, sep="\n", end="\n" if reasons else "", file=sys.stderr)
    if missing:
        print(f"missing trials: {missing}; run them with: {command} --resume", file=sys.stderr)
    print(terminal_table(comparison.scores))
    print(report, flush=True)
    return 1 if missing else 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
