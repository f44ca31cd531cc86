import copy

import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from rt_detectron.engine.base_trainer import BaseTrainer, write_losses


def steps(network, optimizer, seeds):
    for seed in seeds:
        x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("options", [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})])
@pytest.mark.parametrize(
    "formats", [("channels_last", "contiguous_format"), ("contiguous_format", "channels_last")]
)
def test_a_checkpoint_of_another_memory_format_trains_on_the_same(options, formats):
    """torch's fused kernels would pair momentum and weights by their place in memory."""
    optimizer_class, keys = options
    torch.manual_seed(0)
    first = torch.nn.Conv2d(8, 4, 3)
    states = {}
    for memory_format in ("contiguous_format", *formats):
        network = copy.deepcopy(first).to(memory_format=getattr(torch, memory_format))
        trainer = BaseTrainer(network, [], optimizer_class(network.parameters(), lr=0.01, fused=True, **keys))
        trainer.iter = 0
        if states:
            network.load_state_dict(states["weights"])
            trainer.load_state_dict(states["trainer"])
        steps(network, trainer.optimizer, range(2) if not states else [])
        states = {
            "weights": copy.deepcopy(network.state_dict()),
            "trainer": copy.deepcopy(trainer.state_dict()),
        }
    steps(network, trainer.optimizer, [2, 3])
    reference = copy.deepcopy(first)
    steps(reference, optimizer_class(reference.parameters(), lr=0.01, **keys), range(4))
    torch.testing.assert_close(network.weight, reference.weight, rtol=1e-4, atol=1e-6)


def written_by_both():
    rank = comm.get_rank()
    rows = [(i, {"a": i + rank, "b": 1.0}, 0.5 * (1 - rank)) for i in (3, 4)]
    with EventStorage() as storage:
        assert write_losses(rows) == [4.5, 5.5]
    found = {name: history.values() for name, history in storage.histories().items()}
    assert found.pop("rank_data_time") == [(0.5 * (1 - rank), 3), (0.5 * (1 - rank), 4)]
    expected = {"data_time": [(0.5, 3), (0.5, 4)], "total_loss": [(4.5, 3), (5.5, 4)]}
    expected |= {"a": [(3.5, 3), (4.5, 4)], "b": [(1.0, 3), (1.0, 4)]}
    assert found == (expected if rank == 0 else {})


def test_the_losses_of_all_processes_are_averaged(launch):
    launch(written_by_both)
