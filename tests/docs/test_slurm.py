"""The job scripts of the documents, run with stand-ins for Slurm's programs."""

import os
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
JOBS = {
    path.name: match[1]
    for path in REPOSITORY.glob("docs/*.md")
    for match in re.finditer(r"```bash\n(#!/bin/bash\n#SBATCH .*?)```", path.read_text(), re.DOTALL)
}
# What srun's command does: it writes the outcome or not, and ends with a status.
ENDS = {"finished": (True, 0, False), "stopped": (False, 0, True), "failed": (False, 2, False)}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("document", JOBS)
def test_a_job_is_requeued_until_it_is_done(document, end, tmp_path):
    finishes, status, requeues = ENDS[end]
    outcome = {"fine-tune.md": "results.json", "pretrain-imagenet.md": "classifier.pth"}[document]
    writes = f"mkdir -p output/r50; touch output/r50/{outcome};" if finishes else ""
    stand_ins = {
        "srun": f'echo "$@" > asked; {writes} exit {status}',
        "scontrol": '[ "$1" = show ] && echo node7 || echo "$@" > requeued',
    }
    for name, content in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{content}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    ended = subprocess.run(["bash", "-c", JOBS[document]], cwd=tmp_path, env=environment)
    assert (ended.returncode == 0) == (status == 0)
    assert (tmp_path / "requeued").is_file() == requeues
    if requeues:
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    asked = (tmp_path / "asked").read_text()
    assert "tcp://node7:29500" in asked
    assert "--machine-rank $SLURM_NODEID" in asked
    assert "--resume" in asked


def test_the_jobs_are_told_ahead_of_their_limit():
    assert JOBS.keys() == {"fine-tune.md", "pretrain-imagenet.md"}
    for script in JOBS.values():
        assert re.search(r"#SBATCH --signal=TERM@\d+\n", script)
        assert "#SBATCH --requeue\n" in script
