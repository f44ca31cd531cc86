import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from rt_detectron.detection import load_config

CONFIG = "configs/demo/mask_rcnn_r18_fpn.yaml"


@pytest.fixture(scope="package")
def sets(tiny_datasets):
    """Names of the tiny training and test set."""
    names = {}
    for split in ("train", "val"):
        folder = tiny_datasets / "demo" / "detection"
        names[split] = f"rt_test_engine_{split}"
        annotations = folder / "annotations" / f"instances_{split}.json"
        register_coco_instances(names[split], {}, str(annotations), str(folder / split))
    yield names
    for name in names.values():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="package")
def tiny_cfg(sets, tiny_opts):
    """``tiny_cfg(output folder, KEY=value pairs ...)``"""

    def make(output, *opts):
        names = ["DATASETS.TRAIN", f"('{sets['train']}',)", "DATASETS.TEST", f"('{sets['val']}',)"]
        return load_config(CONFIG, [*tiny_opts, *names, "OUTPUT_DIR", str(output), *map(str, opts)])

    return make
