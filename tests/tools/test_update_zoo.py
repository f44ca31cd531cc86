"""The maintainers' tool, and that what it writes is what the repository has."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[2] / "tools" / "update_zoo.py"
NAME = "shufflenet_l2_eps3"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("update_zoo", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def written(tool, tmp_path, monkeypatch):
    """The tool's two files, elsewhere; no hash is recorded in them."""
    table = json.loads(tool.TABLE.read_text())
    for entry in table["sources"][0]["checkpoints"]:
        entry.update(size=None, sha256=None)
    folder = tmp_path / "written"
    folder.mkdir()
    (folder / "zoo.json").write_text(tool.dumped(table))
    monkeypatch.setattr(tool, "TABLE", folder / "zoo.json")
    monkeypatch.setattr(tool, "DOCUMENT", folder / "MODEL_ZOO.md")
    return folder


@pytest.fixture
def mirror(tmp_path, random_classifier):
    path = tmp_path / "mirror" / "l2" / f"{NAME}.ckpt"
    path.parent.mkdir(parents=True)
    network = random_classifier("shufflenet")
    torch.save({"model": {f"module.model.model.{n}": t for n, t in network.state_dict().items()}}, path)
    return tmp_path / "mirror"


def entries(folder: Path) -> dict[str, dict]:
    sources = json.loads((folder / "zoo.json").read_text())["sources"]
    return {entry["name"]: entry for source in sources for entry in source["checkpoints"]}


def error(tool, capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        tool.main([*arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    return printed


def test_the_repository_is_up_to_date(tool):
    table = json.loads(tool.TABLE.read_text())
    assert tool.TABLE.read_text() == tool.dumped(table)
    assert tool.DOCUMENT.read_text() == tool.document(table), "run tools/update_zoo.py"


def test_the_document(tool):
    table = json.loads(tool.TABLE.read_text())
    for entry in table["sources"][0]["checkpoints"]:
        entry.update(sha256="0" * 64 if entry["name"] == "resnet50_l2_eps0" else None)
    text = tool.document(table)
    hub, newer = text.split("## Newer networks")
    vit = (
        "| `Mo2022When_ViT-B` | `timm/vit_base_patch16_224` | wrap | 4/255 | 68.38 | 34.40 |  | [`Mo2022When"
    )
    assert vit in newer
    fare = "| `fare4-clip` | `timm/vit_large_patch14_clip_quickgelu_224` | clip | 4/255 |  |  |  | [Hub]("
    assert fare in newer
    assert newer.startswith("\n\n72 networks of 7 other sources")
    rows = [line for line in hub.splitlines() if line.startswith("| `")]
    assert len(rows) == 68
    base = f"https://huggingface.co/madrylab/robust-imagenet-models/blob/{table['sources'][0]['revision']}"
    for row in (
        "| `resnet50_l2_eps0` | 0 | 75.80 | [resnet50_l2_eps0.ckpt]"
        f"({base}/resnet50_l2_eps0.ckpt) | recorded |",
        "| `resnet50_linf_eps4.0` | 4/255 | 63.86 | [resnet50_linf_eps4.0.ckpt]"
        f"({base}/resnet50_linf_eps4.0.ckpt) |  |",
        f"| `resnet50_linf_eps0` | 0/255 |  | [resnet50_linf_eps0.ckpt]({base}/resnet50_linf_eps0.ckpt) |  |",
    ):
        assert row in rows
    assert "(Salman et al. 2020), 68 files" in text
    assert "1 of 68 checkpoints" in text
    families = [line for line in text.splitlines() if line.startswith("## ")]
    assert families[:3] == ["## resnet", "## wide_resnet", "## densenet"]
    assert len(set(families)) == len(families) == 9


def test_records_a_mirror(tool, written, mirror, capsys):
    before = entries(written)
    (mirror / "mine.ckpt").write_bytes(b"mine")
    tool.main(["--mirror", str(mirror)])
    content = (mirror / "l2" / f"{NAME}.ckpt").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert entries(written) == {**before, NAME: {**before[NAME], "size": len(content), "sha256": digest}}
    assert "1 of 68 checkpoints" in (written / "MODEL_ZOO.md").read_text()
    printed = capsys.readouterr().out
    assert f"unknown   {mirror / 'mine.ckpt'}\n" in printed
    assert f"{NAME}.ckpt: {len(content)} bytes, SHA-256 {digest}\n" in printed
    assert {path.name for path in written.iterdir()} == {"zoo.json", "MODEL_ZOO.md"}
    after = (written / "zoo.json").read_bytes()
    tool.main(["--mirror", str(mirror)])
    tool.main([])
    assert (written / "zoo.json").read_bytes() == after


def test_a_recorded_hash_changes_only_on_demand(tool, written, mirror, capsys):
    tool.main(["--mirror", str(mirror)])
    path = mirror / "l2" / f"{NAME}.ckpt"
    content = torch.load(path)
    torch.save({**content, "epoch": 90}, path)
    before = (written / "zoo.json").read_bytes()
    recorded, found = entries(written)[NAME]["sha256"], hashlib.sha256(path.read_bytes()).hexdigest()
    message = error(tool, capsys, "--mirror", str(mirror))
    assert recorded in message
    assert found in message
    assert "--overwrite" in message
    assert (written / "zoo.json").read_bytes() == before
    tool.main(["--mirror", str(mirror), "--overwrite"])
    assert entries(written)[NAME]["sha256"] == found


def test_damaged_and_wrong_files_are_not_recorded(tool, written, mirror, capsys):
    path = mirror / "l2" / f"{NAME}.ckpt"
    before = (written / "zoo.json").read_bytes()
    other = path.rename(path.with_name("mobilenet_l2_eps3.ckpt"))
    assert "do not fit mobilenet" in error(tool, capsys, "--mirror", str(mirror))
    other.write_bytes(other.read_bytes()[:-1000])
    assert "damaged" in error(tool, capsys, "--mirror", str(mirror))
    assert "is no folder" in error(tool, capsys, "--mirror", str(mirror / "none"))
    assert (written / "zoo.json").read_bytes() == before
