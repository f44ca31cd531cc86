import os
from types import SimpleNamespace

import pytest

from rt_detectron.study import cluster
from rt_detectron.study.grid import Resources
from rt_detectron.utils.errors import InputError

MACHINES = [{"CPU": 16.0, "GPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 6.0}]


@pytest.mark.parametrize(
    ("resources", "fits"),
    [
        (Resources(), 16 + 16 + 6),
        (Resources(cpus=4), 4 + 4 + 1),
        (Resources(gpus=1), 8 + 4),
        (Resources(gpus=8), 1),
        (Resources(cpus=4, gpus=2), 4 + 2),
        (Resources(gpus=0.5), 16 + 8),
        (Resources(gpus=0.4), 16 + 8),  # the last fifth of each GPU is left
    ],
)
def test_trials_that_fit_the_machines(resources, fits):
    nodes = [{"Alive": True, "Resources": machine} for machine in MACHINES]
    dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
    assert cluster.parallel_trials(SimpleNamespace(nodes=lambda: [*nodes, dead]), resources) == fits


def test_trial_that_no_machine_can_run():
    ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    with pytest.raises(InputError, match="asks for 1 CPUs and 8 GPUs, which no machine has"):
        cluster.parallel_trials(ray, Resources(gpus=8))


def test_ray_is_this_machines(ray_here):
    assert cluster.parallel_trials(ray_here, Resources()) == len(os.sched_getaffinity(0))


def test_missing_ray_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'rt_detectron\[study\]'"):
        cluster.import_ray()
