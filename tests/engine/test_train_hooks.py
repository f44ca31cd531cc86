import copy

import torch

from rt_detectron.engine.train_hooks import ExponentialMovingAverage
from rt_detectron.modeling.classifier import Classifier
from rt_detectron.pretrain.trainer import do_train


class Trainer:
    iter = 0


def test_the_average_is_its_formula():
    torch.manual_seed(0)
    model = Classifier("resnet18", num_classes=2)
    hook = ExponentialMovingAverage(model, decay=0.6)
    hook.trainer = Trainer()
    expected = None
    for step in range(12):
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(step))
        hook.trainer.iter = step
        hook.after_step()
        now = copy.deepcopy(model.state_dict())
        decay = min(0.6, (1 + step) / (10 + step))
        expected = expected or now
        for name, tensor in now.items():
            if not tensor.is_floating_point():
                expected[name] = tensor
            elif step:
                expected[name] = decay * expected[name] + (1 - decay) * tensor
    found = hook.averaged.module.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_the_average_is_evaluated_exported_and_resumed(digits_cfg):
    digits_cfg.train.update(epochs=1, ema=0.5)
    do_train(digits_cfg)
    folder = digits_cfg.train.output_dir
    checkpoint = torch.load(f"{folder}/model_final.pth", weights_only=True)
    exported = torch.load(f"{folder}/classifier.pth", weights_only=True)["model"]["fc.weight"]
    assert torch.equal(exported, checkpoint["ema"]["module.network.fc.weight"])
    assert not torch.equal(exported, checkpoint["model"]["network.fc.weight"])
    digits_cfg.train.epochs = 2
    do_train(digits_cfg, resume=True)
    assert torch.load(f"{folder}/model_final.pth", weights_only=True)["ema"]["n_averaged"] == 8
