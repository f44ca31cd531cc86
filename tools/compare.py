#!/usr/bin/env python
"""Compare backbones: run a study's grid of trainings, then write results.json, results.csv and report.html.

Every trial is a process and a folder of its own under OUTPUT/trials; running the same command again runs
only what is missing. Exit status: 0 all trials have results, 1 some are missing, 2 wrong input, 130 stopped.
"""

import argparse
import shlex
import signal
import sys
from pathlib import Path

from tabulate import tabulate

from rt_detectron.errors import one_line_errors
from rt_detectron.study.grid import load_study
from rt_detectron.study.report import study_table, terminal_table, write_report
from rt_detectron.study.run import Outcome, is_finished, output_folder, run_trials, trial_folder

TRAIN_NET = Path(__file__).resolve().with_name("train_net.py")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--study", required=True, metavar="FILE", help="YAML file, e.g. configs/study/demo.yaml"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the trials and the report")
    parser.add_argument("--dry-run", action="store_true", help="print the grid and its commands, run nothing")
    args = parser.parse_args(argv)
    output = Path(args.output)
    study = load_study(args.study)
    trials = study.trials()
    if args.dry_run:
        print_grid(trials, output)
        return 0
    command = shlex.join(["python", "tools/compare.py", "--study", args.study, "--output", args.output])
    # A SIGTERM (a batch system's, say) stops the running trial as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with output_folder(output):
            outcomes = run_trials(trials, output, TRAIN_NET)
            report = write_report(study, outcomes, output, command)
    except KeyboardInterrupt:
        print(f"stopped; this goes on where it stopped: {command}", file=sys.stderr)
        return 130
    missing = [outcome for outcome in outcomes if outcome.results is None]
    print_missing(missing, command)
    print(terminal_table(study_table(study, outcomes)))
    print(report, flush=True)
    return 1 if missing else 0


def print_grid(trials, output: Path) -> None:
    """The trials with their state, and the command of each."""
    states = ["finished" if is_finished(output, trial) else "to run" for trial in trials]
    print(
        tabulate(
            [(trial.name, state) for trial, state in zip(trials, states, strict=True)], ["trial", "state"]
        )
    )
    print(f"{states.count('to run')} of {len(trials)} trials to run:")
    for trial, state in zip(trials, states, strict=True):
        if state == "to run":
            print(shlex.join(trial.command("python", str(TRAIN_NET), str(trial_folder(output, trial)))))


def print_missing(missing: list[Outcome], command: str) -> None:
    for outcome in missing:
        print(f"trial {outcome.trial.name} failed: {outcome.error}", file=sys.stderr)
    if missing:
        print(f"missing trials: {len(missing)}; this runs only them: {command}", file=sys.stderr)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
