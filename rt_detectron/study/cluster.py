"""The Ray session that trials run in: this machine alone, or a cluster."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rt_detectron.study import worker
from rt_detectron.study.grid import Resources
from rt_detectron.utils.errors import InputError, one_line

_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's least: trials exchange files, not objects
# What the trials' processes get from the driver, wherever they run.
_HANDED_ON = ("DETECTRON2_DATASETS", "RT_DETECTRON_ZOO", "RT_DETECTRON_CACHE", "PYTHONPATH")


def import_ray() -> Any:
    """The module ray.

    Raises:
        InputError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise InputError("a study runs on Ray: pip install 'rt_detectron[study]'") from None
    return ray


@contextmanager
def ray_session(address: str | None) -> Iterator[Any]:
    """Connect to the cluster at ``address``, or start Ray on this machine; gives the module ray.

    A session that this process has already is used and left open.

    Raises:
        InputError: Ray is not installed, or there is no cluster at ``address``.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    local = {} if address else {"object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"no Ray at --ray-address {address}: {one_line(error)}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def parallel_trials(ray: Any, resources: Resources) -> int:
    """How many trials fit into the session at a time.

    Raises:
        InputError: not a single one, so that Ray would wait forever.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = 0
    for node in nodes:
        by_gpu = node.get("GPU", 0) / resources.gpus if resources.gpus else float("inf")
        if 0 < resources.gpus < 1:  # a part of a GPU lies on one GPU
            by_gpu = node.get("GPU", 0) * (1 / resources.gpus // 1)
        fits += int(min(node.get("CPU", 0) / resources.cpus, by_gpu))
    if fits == 0:
        machines = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise InputError(
            f"a trial asks for {resources.cpus} CPUs and {resources.gpus:g} GPUs, which no machine has "
            f"({machines}): lower the study's resources, or give --ray-address"
        )
    return fits


def trial_task(ray: Any, resources: Resources, git: dict[str, Any] | None) -> Callable[[list, str], Any]:
    """``submit(steps, folder)``: starts :func:`worker.run_steps` as a Ray task and gives its reference."""
    ray.cloudpickle.register_pickle_by_value(worker)
    # Ray's own retries would be silent; the driver does them.
    task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0)(worker.run_steps)
    environment = {name: os.environ[name] for name in _HANDED_ON if name in os.environ}
    processes = max(1, int(resources.gpus))  # of one trial, which share its CPUs
    environment["OMP_NUM_THREADS"] = str(max(1, resources.cpus // processes))

    def submit(steps: list[worker.Step], folder: str):
        return task.remote(steps, folder, os.getcwd(), environment, git)

    return submit
