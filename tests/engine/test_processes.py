"""With several processes: tests/detection/test_processes.py and tests/pretrain/test_trainer.py."""

from contextlib import suppress

import torch
from detectron2.utils import comm
from torch import nn

from rt_detectron.engine.processes import first_ones_buffers


def test_a_process_has_its_own_buffers_again_after_an_evaluation(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, rank: tensor.fill_(7))
    norm = nn.BatchNorm2d(3)
    norm.running_mean += 1
    weight = norm.weight.clone()
    with suppress(KeyboardInterrupt), first_ones_buffers(norm):
        assert {value.item() for buffer in norm.buffers() for value in buffer.flatten()} == {7}
        raise KeyboardInterrupt
    assert norm.running_mean.tolist() == [1, 1, 1]
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.weight, weight)
