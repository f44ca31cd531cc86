"""Two gloo processes against torch's BatchNorm2d on the batches of both."""

import copy

import pytest
import torch
from torch import nn

from rt_detectron.checkpoint.architectures import build_classifier
from rt_detectron.layers.sync_bn import CpuSyncBatchNorm, use_sync_bn
from rt_detectron.utils.errors import InputError


def batches():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 8, 4, 5, 6, generator=generator)  # 3 steps of 8 images


def norm():
    module = nn.Sequential(nn.BatchNorm2d(4))
    with torch.no_grad():
        module[0].weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return module


def one_of_two(path):
    rank = torch.distributed.get_rank()
    module = use_sync_bn(norm(), "cpu").train()
    assert type(module[0]) is CpuSyncBatchNorm
    grads = []
    for step in batches():
        x = step[rank::2].clone().requires_grad_(True)
        module(x).square().mul(step[rank::2]).sum().backward()
        grads.append(x.grad)
    torch.save({"state": module.state_dict(), "grads": grads}, f"{path}/{rank}.pth")


def test_two_processes_are_one_batch(tmp_path, launch):
    launch(one_of_two, str(tmp_path))
    reference = norm().train()
    expected = []
    for step in batches():
        x = step.clone().requires_grad_(True)
        reference(x).square().mul(step).sum().backward()
        expected.append(x.grad)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        for name, tensor in reference.state_dict().items():
            torch.testing.assert_close(found["state"][name], tensor, rtol=1e-5, atol=1e-6)
        for grad, whole in zip(found["grads"], expected, strict=True):
            torch.testing.assert_close(grad, whole[rank::2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_alone_it_is_batch_norm(training):
    ours, reference = use_sync_bn(norm(), "cpu").train(training), norm().train(training)
    x = batches()[0]
    assert torch.equal(ours(x), reference(x))
    for name, tensor in reference.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


def test_on_gpus_it_is_torchs():
    assert type(use_sync_bn(norm(), "cuda")[0]) is nn.SyncBatchNorm


def test_norms_with_an_activation_keep_it_on_gpus_and_are_refused_on_cpus():
    torch.manual_seed(0)
    network = build_classifier("timm/mobilenetv3_small_100", 3).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = network(x)
    synchronised = use_sync_bn(copy.deepcopy(network), "cuda")
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules())
    torch.testing.assert_close(synchronised(x), expected)
    with pytest.raises(InputError, match=r"train.sync_bn: bn1 is a BatchNormAct2d.*set train.sync_bn=False"):
        use_sync_bn(network, "cpu")
