import pytest
from detectron2.utils.file_io import PathManager

import rt_detectron  # noqa: F401  (registers the handler)
from rt_detectron.errors import InputError


def test_a_name_is_a_file_of_the_zoo_folder(tmp_path, monkeypatch):
    (tmp_path / "resnet50_l2_eps3.pkl").write_bytes(b"weights")
    monkeypatch.setenv("RT_DETECTRON_ZOO", str(tmp_path))
    assert PathManager.get_local_path("robust://resnet50_l2_eps3.pkl") == str(
        tmp_path / "resnet50_l2_eps3.pkl"
    )
    assert PathManager.isfile("robust://resnet50_l2_eps3.pkl")
    assert not PathManager.isfile("robust://resnet50_l2_eps5.pkl")
    with PathManager.open("robust://resnet50_l2_eps3.pkl", "rb") as file:
        assert file.read() == b"weights"


@pytest.mark.parametrize("folder", ["", "empty"])
def test_a_missing_name_tells_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("RT_DETECTRON_ZOO", str(tmp_path / folder) if folder else "")
    with pytest.raises(InputError, match=r"resnet50_l2_eps3.ckpt.*RT_DETECTRON_ZOO=FOLDER") as error:
        PathManager.get_local_path("robust://resnet50_l2_eps3.pkl")
    assert "\n" not in str(error.value)
