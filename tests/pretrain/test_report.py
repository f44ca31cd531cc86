import io
import json

import pytest
from PIL import Image

from rt_detectron.pretrain.report import markdown, write_report


@pytest.fixture
def results():
    row = {"value": 50.0, "low": 23.66, "high": 76.34, "images": 10}
    return {
        "accuracy": {"clean": row, "pgd20": row | {"value": 25.0}},
        "per_class": {
            0: {"images": 6, "clean": 50.0, "pgd20": 20.0},
            1: {"images": 4, "clean": 5.0, "pgd20": 1.0},
        },
        "curve": {
            "attack": "pgd20",
            "images": 10,
            "eps": [0.0, 2.0, 4.0, 127.5],
            "value": [50.0, 30.0, 25.0, 0.0],
        },
        "findings": [],
        "classifier": "resnet18 of classifier.pth",
        "threat_model": {"norm": "linf", "eps": 4.0},
        "classes": {0: "cat", 1: "dog"},
        "versions": {"torch": "2"},
    }


def test_writes_json_markdown_and_a_picture(results, tmp_path):
    paths = write_report(results, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "eps_curve.png",
        "evaluation.json",
        "evaluation.md",
    ]
    assert len(paths) == 3
    assert json.loads((tmp_path / "evaluation.json").read_text())["accuracy"] == results["accuracy"]
    assert (tmp_path / "evaluation.md").read_text() == markdown(results)
    with Image.open(io.BytesIO((tmp_path / "eps_curve.png").read_bytes())) as image:
        assert image.convert("L").getextrema()[0] < 100  # something is drawn


def test_says_what_it_was_and_how_sure(results):
    text = markdown(results)
    assert "Under linf eps 4/255." in text
    assert "| pgd20 | 25.00 | 23.66 to 76.34 | 10 |" in text
    assert "| dog | 4 | 5.0 | 1.0 |" in text
    assert "No sign of masked gradients: accuracy under pgd20 falls to 0.0 % at eps 127.5" in text
    assert "AutoAttack" not in text


def test_says_when_not_to_trust_it(results):
    results["findings"] = ["the attack is misled"]
    text = markdown(results)
    assert "Gradients may be masked, and the numbers too good:\n\n- the attack is misled\n" in text
    assert "No sign" not in text
    del results["curve"]
    results["findings"] = []
    assert "Not looked into" in markdown(results)
    assert "eps_curve.png" not in markdown(results)
