import pytest
import torch

from rt_detectron.transfer.recipe import load_transfer_config


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder for cached features."""
    monkeypatch.setenv("RT_DETECTRON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture(scope="session")
def classifier_file(tmp_path_factory, random_classifier) -> str:
    """A ShuffleNet, the smallest network of the zoo, as if trained for five other classes."""
    path = tmp_path_factory.mktemp("classifier") / "shufflenet_l2_eps3.pth"
    torch.save(random_classifier("shufflenet").state_dict(), path)
    return str(path)


@pytest.fixture
def make_cfg(digit_folders, classifier_file, tmp_path):
    """``make_cfg(method, override ...)``: the shipped recipe on digits of 16 pixels, for seconds."""

    def make(method: str, *overrides: str):
        usual = [
            f"weights={classifier_file}",
            "dataset.name=folder",
            f"dataset.root={digit_folders}",
            "dataset.resize=16",
            "dataset.image_size=16",
            "dataloader.total_batch_size=16",
            "dataloader.num_workers=0",
            "train.device=cpu",
            "train.epochs=6",
            "train.log_period=1",
            "train.checkpoint_epochs=1",
            "train.export=false",
            f"train.output_dir={tmp_path}/out",
        ]
        cfg = load_transfer_config(f"configs/transfer/{method}.py", [*usual, *overrides])
        (tmp_path / "out").mkdir(exist_ok=True)
        return cfg

    return make


@pytest.fixture
def no_forward_pass(monkeypatch):
    """From here on, whoever computes features fails."""

    def use():
        def forward(*_):
            raise AssertionError("a forward pass")

        monkeypatch.setattr("rt_detectron.transfer.features.FeatureExtractor.forward", forward)

    return use
