"""Which waits for an accelerator a detector's step asks for by itself; Detectron2's heads have their own."""

import copy

import pytest
import torch
from accelerator import Accelerator
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from small_detectors import SMALL

from rt_detectron.detection.adversarial import AdversarialTraining
from rt_detectron.detection.steps import build_optimizer, build_trainer, fast

# Not among them, since they choose by values as Detectron2's heads do: CLIP, and MTD between two attacks.
METHODS = {
    "clean": AdversarialTraining(),
    "pgd": AdversarialTraining(steps=2, norm="linf", eps=8.0, loss="A_box"),
    "replays": AdversarialTraining(replays=2, loss="A_box", carry_over=True),
}


def batch() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for image_id, size in enumerate([(48, 64), (64, 48)]):
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.tensor([[4.0, 4, 30, 40], [20, 10, 44, 40]]))
        instances.gt_classes = torch.tensor([0, 2])
        instances.gt_masks = BitMasks(torch.ones(2, *size, dtype=torch.bool))
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        found.append({"image": image, "image_id": image_id, "instances": instances})
    return found


def train(model: torch.nn.Module, cfg, method: AdversarialTraining) -> dict[str, torch.Tensor]:
    loader = method.batches([batch()] * 3, model, max_iter=100)
    trainer = build_trainer(model, loader, build_optimizer(cfg, model), log_period=20)
    for trainer.iter in range(2):
        torch.manual_seed(trainer.iter)
        with EventStorage():
            trainer.run_step()
        assert not trainer.has_diverged()
    return model.state_dict()


@pytest.mark.parametrize("name", METHODS)
def test_a_step_asks_for_no_wait_of_its_own(make_cfg, name):
    cfg = make_cfg("resnet18")
    cfg.merge_from_list([part for pair in SMALL.items() for part in pair])
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 20
    cfg.SOLVER.AMP.ENABLED = True  # else the optimiser is fused, which takes no tensors of the stand-in
    torch.manual_seed(0)
    model = fast(build_model(cfg))
    expected = train(copy.deepcopy(model), cfg, METHODS[name])
    with Accelerator() as accelerator:
        found = train(accelerator.put(model), cfg, METHODS[name])
        assert accelerator.own_waits == []
        assert any("detectron2" in wait for wait in accelerator.waits)  # none is overlooked
    for key, tensor in found.items():  # and it is the step that it is elsewhere
        torch.testing.assert_close(tensor.numbers, expected[key], rtol=1e-3, atol=1e-5, msg=key)
