import csv
import html.parser
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_masks

from rt_detectron.study.figures import make_section
from rt_detectron.study.report import study_table, terminal_table, write_report
from rt_detectron.study.run import run_study

OUT = Path("out")


@pytest.fixture
def tiny_coco(tmp_path):
    """Six real image files with one annotated disc each; gives the folder of val.json."""
    root = tmp_path / "coco"
    root.mkdir()
    images, annotations = [], []
    for image_id in range(1, 7):
        pixels = np.random.default_rng(image_id).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{image_id}.jpg")
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "width": 60, "height": 40})
        y, x = np.mgrid[:40, :60]
        rle = rle_masks.encode(np.asfortranarray(((x - 30) ** 2 + (y - 20) ** 2 < 100).astype(np.uint8)))
        annotations.append(
            {
                "id": image_id,
                "image_id": image_id,
                "category_id": 7,
                "bbox": [20, 10, 20, 20],
                "area": 314,
                "iscrowd": 0,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            }
        )
    categories = [{"id": 7, "name": "<b>disc</b>"}]
    (root / "val.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return root


class Page(html.parser.HTMLParser):
    """Collects the tags and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def report(study, tools):
    outcomes = run_study(study, OUT, tools)
    page = write_report(study, outcomes, OUT, "python tools/compare.py --study <x>")
    return Page(page.read_text()), outcomes


def test_report_is_complete_and_self_contained(make_study, tools, tiny_coco):
    page, _ = report(
        make_study(["TEST.COCO", str(tiny_coco)], name="A <script>alert(1)</script> study"), tools
    )
    assert "A <script>alert(1)</script> study" in page.text  # as text,
    assert not [
        tag for tag, _ in page.tags if tag in ("script", "b", "link", "iframe", "object", "x")
    ]  # not as tags
    links = [attrs[key] for _, attrs in page.tags for key in ("src", "srcset", "href") if key in attrs]
    assert links
    assert all(link.startswith("data:image/") for link in links)
    # two score plots and one of the loss, light and dark; four examples
    assert len([link for link in links if link.startswith("data:image/svg")]) == 6
    assert len([link for link in links if link.startswith("data:image/jpeg")]) == 4
    assert "21.25 ± 1.06" in page.text  # standard, box AP 20.5 and 22
    assert "Δ +1.50 ± 0.00" in page.text
    assert "box AP +1.50 (higher with 2 of 2 seeds, standard deviation 0.00)" in page.text
    assert "2 seeds are few" in page.text
    assert "score of at least 0.3" in page.text
    assert "images 1, 3, 4, 6 of tiny_val" in page.text
    assert "Missing" not in page.text


def test_json_is_strict_and_csv_tidy(make_study, tools):
    report(make_study(seeds=[3]), tools)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads((OUT / "results.json").read_text(), parse_constant=refuse)
    assert content["study"]["baseline"] == "standard"
    assert content["trials"][0]["results"]["metrics"]["bbox"]["AP-person"] is None
    assert content["table"][1]["change"]["mask AP"] == {"n": 1, "mean": 1.5, "sd": None}
    with (OUT / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 6
    assert rows[0] == {
        "arm": "standard",
        "detector": "mask_rcnn",
        "learning_rate": "0.02",
        "seed": "3",
        "task": "bbox",
        "metric": "AP",
        "value": "24.5",
    }
    assert rows[3]["metric"] == "AP-person"
    assert rows[3]["value"] == ""


def test_one_seed_has_no_spread_and_no_verdict(make_study, tools):
    page, outcomes = report(make_study(seeds=[1]), tools)
    assert "20.50 ± n/a" in page.text
    assert "A single seed shows no spread" in page.text
    study = make_study(seeds=[1])
    line = terminal_table(study_table(study, outcomes)).splitlines()[3]
    assert re.split(r"\s{2,}", line)[:6] == ["robust", "mask_rcnn", "0.02", "1", "22.00 ± n/a", "+1.50 ± n/a"]


def test_missing_trials_are_named(make_study, tools):
    page, _ = report(make_study(robust_opts=["TEST.CRASH_ONCE", "crashed"]), tools)
    assert "Missing trials: 1 of 4" in page.text
    assert "robust/mask_rcnn/lr0.02/seed1" in page.text
    assert "RuntimeError: CUDA out of memory" in page.text
    assert "python tools/compare.py --study <x>" in page.text
    assert "higher with 1 of 1 seeds" in page.text


def test_nothing_finished_still_gives_a_report(make_study, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(9)")
    page, _ = report(make_study(), broken)
    assert "Missing trials: 4 of 4" in page.text
    assert "No arm can be compared with the baseline yet" in page.text


def test_undefined_ap_is_named_and_enters_no_mean(make_study, tools):
    study = make_study()
    outcomes = run_study(study, OUT, tools)
    outcomes[1].results["metrics"]["bbox"]["AP"] = float("nan")
    page = Page(write_report(study, outcomes, OUT, "command").read_text())
    assert "undefined box AP" in page.text
    assert "23.50 ± n/a (n = 1)" in page.text


def test_many_learning_rates_warn_of_choosing(make_study, tools):
    page, _ = report(make_study(learning_rates=[0.02, 0.01], seeds=[1]), tools)
    assert "choosing the best one by these numbers would favour luck" in page.text


def test_missing_pictures_are_named_not_fatal(make_study, tools, tiny_coco):
    study = make_study(["TEST.COCO", str(tiny_coco)])
    _, outcomes = report(study, tools)
    shutil.rmtree(tiny_coco)
    section = make_section(study, ("mask_rcnn", 0.02), outcomes)
    assert section.examples == []
    assert "No example pictures" in section.note
    assert "val.json" in section.note


def test_loss_curve_is_plotted_from_whole_lines_only(make_study, tools):
    study = make_study(seeds=[1])
    outcomes = run_study(study, OUT, tools)
    assert len(make_section(study, ("mask_rcnn", 0.02), outcomes).curves) == 1
    for outcome in outcomes:
        (outcome.folder / "metrics.json").write_text('{"iteration": 1, "lr": 2}\n{"iteration": 2, "total_l')
    assert make_section(study, ("mask_rcnn", 0.02), outcomes).curves == []
