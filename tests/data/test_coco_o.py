from pathlib import Path

import pytest
from detectron2.data import MetadataCatalog

from rt_detectron.data import check_datasets
from rt_detectron.data.coco_o import SETS, effective_robustness
from rt_detectron.utils.errors import InputError


def test_each_domain_is_a_set_with_cocos_classes():
    assert len(SETS) == 6
    for name in SETS:
        metadata = MetadataCatalog.get(name)
        folder = Path(metadata.image_root).parent
        assert folder.parts[-2:] == ("coco-o", name.removeprefix("coco_o_"))
        assert Path(metadata.json_file) == folder / "annotations" / "instances_val2017.json"
        assert metadata.thing_classes == MetadataCatalog.get("coco_2017_val").thing_classes


def test_a_missing_set_is_one_line():
    with pytest.raises(InputError, match=r"coco_o_tattoo needs .*coco-o/tattoo.*datasets/README\.md"):
        check_datasets(["coco_o_tattoo"])


def test_effective_robustness():
    assert effective_robustness([10, 20, 30], 40) == pytest.approx(20 - 18)


def test_effective_robustness_is_the_papers():
    """Their row of Faster R-CNN R50-FPN, as https://github.com/alibaba/easyrobust/issues/21 quotes it."""
    domains = {
        "sketch": 9.8,
        "weather": 25.1,
        "cartoon": 13.9,
        "painting": 23.3,
        "tattoo": 10.1,
        "handmake": 16.3,
    }
    assert round(effective_robustness(list(domains.values()), 37.4), 2) == -0.41
