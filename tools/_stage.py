#!/usr/bin/env python
"""Run commands side by side: their output goes to files, one line with the time left to the screen.

    _stage.py TITLE RESULT COMMAND [RESULT COMMAND ...]

A command runs in this Python and makes the file RESULT; it is skipped if that is there. Beside RESULT are its
log and, if it trains, the metrics.json that tells the time left. If a command fails, the others go on.
Exit status: 0 all results are there, 1 some are missing, 130 stopped. This is no tool.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from _packages import require

require("rt_detectron")

from tqdm import tqdm  # noqa: E402

from rt_detectron.study.progress import state  # noqa: E402
from rt_detectron.study.worker import last_lines, start, stop  # noqa: E402

LOG = "stage.log"


def run(title: str, commands: Mapping[Path, list[str]]) -> int:
    """Run the commands, by their results. Returns the exit status."""
    began = time.monotonic()
    threads = max(1, (os.cpu_count() or 1) // max(1, len(commands)))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    running: dict[Path, subprocess.Popen] = {}
    failed = 0
    try:
        for result, command in commands.items():
            result.parent.mkdir(parents=True, exist_ok=True)
            running[result] = start([sys.executable, *command], result.parent / LOG, environment=environment)
        with tqdm(bar_format="{desc}", dynamic_ncols=True, leave=False, disable=None) as line:
            while running:
                states = (f"{result.parent.name}: {state(result.parent)}" for result in running)
                line.set_description_str(f"{title}: {'; '.join(states)}")
                time.sleep(0.5)
                for result in [result for result, process in running.items() if process.poll() is not None]:
                    stop(running.pop(result))
                    if not result.is_file():
                        failed += 1
                        log = result.parent / LOG
                        line.write(f"no {result}; the end of {log}:\n{last_lines(log)}", file=sys.stderr)
    finally:
        for process in running.values():
            process.terminate()  # all at once, since each takes a while to write its checkpoint
        for process in running.values():
            stop(process)
    logs = ", ".join(str(result.parent / LOG) for result in commands)
    done = f"{failed} failed" if failed else "done"
    print(f"{title}: {done} after {tqdm.format_interval(time.monotonic() - began)}; logs: {logs}", flush=True)
    return 1 if failed else 0


def main(argv: list[str]) -> int:
    title, *rest = argv
    pairs = zip(rest[::2], rest[1::2], strict=True)
    missing = {Path(result): shlex.split(command) for result, command in pairs if not Path(result).is_file()}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(title, missing) if missing else 0
    except KeyboardInterrupt:
        print(f"{title}: stopped; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
