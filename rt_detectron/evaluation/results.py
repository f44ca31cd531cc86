"""results.json, which every training and evaluation writes: its metrics and what they were computed from."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from rt_detectron.evaluation.build import inference_folder
from rt_detectron.utils.files import text_sha256, write_json
from rt_detectron.utils.numbers import finite
from rt_detectron.utils.versions import versions


def write_results(cfg: CfgNode, results: dict, wall_time_s: float, iterations: int) -> str:
    """Write ``OUTPUT_DIR/results.json`` atomically and return its path.

    Args:
        cfg: the config of the run.
        results: Detectron2's evaluation results, e.g. {"bbox": {"AP": 38.6, ...}, "segm": {...}}, in percent.
        wall_time_s: of this process, in seconds.
        iterations: of the training; 0 for an evaluation only.
    """
    content = {"metrics": finite(results), "iterations": iterations, **provenance(cfg, wall_time_s)}
    path = os.path.join(cfg.OUTPUT_DIR, "results.json")
    write_json(path, content)
    return path


def provenance(cfg: CfgNode, wall_time_s: float) -> dict:
    """What every results file says about its run. Predictions are looked up in ``cfg.OUTPUT_DIR``."""
    return {
        "seed": cfg.SEED,
        "wall_time_s": round(wall_time_s, 1),
        "config_sha256": config_sha256(cfg),
        "weights": cfg.MODEL.WEIGHTS,
        "versions": versions(),
        "datasets": [describe_dataset(name, inference_folder(cfg, name)) for name in cfg.DATASETS.TEST],
    }


def config_sha256(cfg: CfgNode) -> str:
    """SHA-256 of a config, not counting its output folder."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = ""
    return text_sha256(cfg.dump())


def describe_dataset(name: str, folder: str) -> dict[str, str | None]:
    """The files of a test set, and of its predictions if they are in ``folder``."""
    found = MetadataCatalog.get(name)
    predictions = os.path.join(folder, "coco_instances_results.json")
    return {
        "name": name,
        "json_file": found.get("json_file"),
        "image_root": found.get("image_root"),
        "predictions": predictions if os.path.isfile(predictions) else None,
    }
