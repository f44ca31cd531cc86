"""mIoU image by image, against Detectron2's own evaluator."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator as Detectron2SemSegEvaluator
from PIL import Image

from rt_detectron.evaluation.counts import worst_choice
from rt_detectron.evaluation.sem_seg import SemSegEvaluator, read_labels
from rt_detectron.utils.errors import InputError

NAME, CLASSES, IMAGES = "rt_test_sem_seg", ["sky", "grass", "road", "car"], 5


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Inputs and outputs of a model that is right about two pixels of three; class 3 is in no label."""
    folder, rng = tmp_path_factory.mktemp("labels"), np.random.default_rng(0)
    inputs, outputs = [], []
    for number in range(IMAGES):
        labels = np.kron(rng.integers(0, 3, (3, 4)), np.ones((5, 5), int)).astype(np.uint8)
        labels[:2] = 255
        path = folder / f"{number}.png"
        Image.fromarray(labels).save(path)
        inputs.append({"file_name": f"{number}.jpg", "sem_seg_file_name": str(path)})
        right = rng.random(labels.shape) < 0.67
        found = np.where(right & (labels != 255), labels, rng.integers(0, 4, labels.shape))
        outputs.append(
            {"sem_seg": torch.nn.functional.one_hot(torch.tensor(found).long(), 4).permute(2, 0, 1)}
        )
    DatasetCatalog.register(NAME, lambda: inputs)
    MetadataCatalog.get(NAME).set(stuff_classes=CLASSES, ignore_label=255)
    yield inputs, outputs
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def evaluated(evaluator, inputs, outputs, **options):
    evaluator.reset()
    evaluator.process(inputs[:2], outputs[:2])
    evaluator.process(inputs[2:], outputs[2:])
    return evaluator.evaluate(**options)["sem_seg"]


def test_the_numbers_and_files_are_detectron2s(labelled, tmp_path):
    theirs = Detectron2SemSegEvaluator(NAME, output_dir=str(tmp_path / "a"), sem_seg_loading_fn=read_labels)
    expected = evaluated(theirs, *labelled)
    found = evaluated(SemSegEvaluator(NAME, output_dir=str(tmp_path / "b")), *labelled)
    assert found.keys() == expected.keys()
    np.testing.assert_equal(found, expected)
    one, other = ((tmp_path / each / "sem_seg_predictions.json").read_text() for each in "ab")
    assert one == other


def test_some_images_are_as_a_set_of_their_own(labelled):
    inputs, outputs = labelled
    theirs = Detectron2SemSegEvaluator(NAME, sem_seg_loading_fn=read_labels)
    theirs.reset()
    theirs.process(inputs[1:4:2], outputs[1:4:2])
    expected = theirs.evaluate()["sem_seg"]
    found = evaluated(SemSegEvaluator(NAME), *labelled, img_ids=["1.jpg", "3.jpg"])
    np.testing.assert_equal(found, expected)


def test_no_other_choice_for_an_image_leaves_less(labelled):
    """And none is worse than one attack on all images."""
    evaluator, (inputs, outputs) = SemSegEvaluator(NAME), labelled
    parts = []
    for turn in range(3):
        evaluated(evaluator, inputs, outputs[turn:] + outputs[:turn])
        parts.append(evaluator.scored(evaluator._predictions))
    counts = np.stack(parts)
    choice = worst_choice(counts, evaluator.main_metric)

    def left(choice):
        return float(evaluator.main_metric(counts[choice, range(IMAGES)].sum(0)))

    assert len(set(choice)) > 1
    assert left(choice) <= min(left(np.full(IMAGES, k)) for k in range(3))
    for image in range(IMAGES):
        for attack in range(3):
            other = choice.copy()
            other[image] = attack
            assert left(choice) <= left(other) + 1e-12


def test_a_set_without_classes_is_refused_in_one_line():
    MetadataCatalog.get("rt_test_no_classes").ignore_label = 255
    with pytest.raises(InputError, match="rt_test_no_classes has no stuff_classes in its metadata"):
        SemSegEvaluator("rt_test_no_classes")
    MetadataCatalog.remove("rt_test_no_classes")
