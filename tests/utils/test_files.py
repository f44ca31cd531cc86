from rt_detectron.utils.files import find_config, shipped


def test_shipped_configs_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = str(shipped("configs") / "robust_r50_eps3.yaml")
    assert find_config("robust_r50_eps3.yaml") == find_config("configs/robust_r50_eps3.yaml") == expected
    assert find_config("mine.yaml") == "mine.yaml"


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "robust_r50_eps3.yaml").write_text("MODEL: {}")
    assert find_config("robust_r50_eps3.yaml") == "robust_r50_eps3.yaml"
