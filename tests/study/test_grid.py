import json

import pytest
import yaml

from rt_detectron.checkpoint import zoo
from rt_detectron.errors import InputError
from rt_detectron.study.grid import load_study


@pytest.fixture
def write_study(tmp_path, monkeypatch):
    """Writes study.yaml, valid but for the given changes (None removes a key); gives its name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "std.pkl").write_bytes(b"standard")
    (tmp_path / "l2.pkl").write_bytes(b"robust")
    (tmp_path / "base.yaml").write_text("SOLVER: {MAX_ITER: 100}\n")
    (tmp_path / "mask.yaml").write_text("_BASE_: base.yaml\n")

    def write(**changes):
        study = {
            "name": "test",
            "baseline": "standard",
            "arms": {
                "standard": {"weights": "std.pkl"},
                "l2": {"weights": "l2.pkl", "opts": ["A.B", [1, 2]]},
            },
            "detectors": {"mask": {"config": "mask.yaml", "opts": ["A.C", True]}},
            "learning_rates": [0.02, "1e-2"],
            "seeds": [1, 2],
            "opts": ["A.D", 0.5],
            **changes,
        }
        text = yaml.safe_dump(
            {key: value for key, value in study.items() if value is not None}, sort_keys=False
        )
        (tmp_path / "study.yaml").write_text(text)
        return "study.yaml"

    return write


def test_trials_are_the_whole_grid_seed_by_seed(write_study):
    trials = load_study(write_study()).trials()
    assert [trial.name for trial in trials[:4]] == [
        "standard/mask/lr0.02/seed1",
        "l2/mask/lr0.02/seed1",
        "standard/mask/lr0.01/seed1",
        "l2/mask/lr0.01/seed1",
    ]
    assert len({trial.name for trial in trials}) == len(trials) == 8


def test_command_is_train_nets(write_study):
    trial = load_study(write_study()).trials()[1]
    expected = (
        "python|train_net.py|--config-file|mask.yaml|--resume|A.D|0.5|A.C|True|A.B|[1, 2]"
        "|OUTPUT_DIR|out|MODEL.WEIGHTS|l2.pkl|SOLVER.BASE_LR|0.02|SEED|1"
    )
    assert "|".join(trial.command("python", "train_net.py", "out")) == expected


def test_specification_survives_json(write_study):
    specification = load_study(write_study()).trials()[0].specification()
    assert json.loads(json.dumps(specification)) == specification


@pytest.mark.parametrize(
    ("file", "key"),
    [("std.pkl", "weights_sha256"), ("mask.yaml", "config_sha256"), ("base.yaml", "config_sha256")],
)
def test_specification_notices_changed_files(write_study, tmp_path, file, key):
    before = load_study(write_study()).trials()[0].specification()
    with (tmp_path / file).open("a") as stream:
        stream.write("\n# changed")
    after = load_study("study.yaml").trials()[0].specification()
    assert [name for name in before if before[name] != after[name]] == [key]


def test_weights_behind_a_scheme_are_not_looked_for(write_study):
    study = load_study(write_study(arms={"standard": {"weights": "robust://resnet50_l2_eps0.pkl"}}))
    assert study.trials()[0].weights_sha256 is None


def test_weights_may_carry_detectron2_options(write_study):
    study = load_study(write_study(arms={"standard": {"weights": "std.pkl?matching_heuristics=True"}}))
    assert study.trials()[0].weights == "std.pkl?matching_heuristics=True"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "unknown key sedes"),
        ({"seeds": None}, "key seeds is missing"),
        ({"name": " "}, "name: write a few words"),
        ({"baseline": "vanilla"}, "baseline: 'vanilla' is not an arm; arms are standard, l2"),
        ({"baseline": ["standard"]}, "baseline: .* is not an arm"),
        ({"arms": {}}, "arms: give at least one"),
        ({"arms": ["standard"]}, "arms: give at least one"),
        ({"arms": {"<script>": {"weights": "std.pkl"}}}, "arms: the name '<script>' becomes a folder"),
        ({"arms": {"..": {"weights": "std.pkl"}}}, "arms: the name '..' becomes a folder"),
        ({"arms": {"a/b": {"weights": "std.pkl"}}}, "arms: the name 'a/b' becomes a folder"),
        ({"arms": {18: {"weights": "std.pkl"}}}, "arms: the name 18 becomes a folder"),
        ({"arms": {"standard": "std.pkl"}}, "arms.standard: give the keys weights"),
        ({"arms": {"standard": {"wieghts": "std.pkl"}}}, "arms.standard: unknown key wieghts"),
        ({"arms": {"standard": {"weights": "gone.pkl"}}}, "arms.standard.weights: no file gone.pkl"),
        ({"arms": {"standard": {"weights": None}}}, "arms.standard.weights: give a path"),
        ({"detectors": {"mask": {"config": "gone.yaml"}}}, "detectors.mask.config: no file gone.yaml"),
        ({"detectors": {"mask": {"config": "mask.yaml", "opts": ["A"]}}}, "detectors.mask.opts: give pairs"),
        ({"opts": ["SEED", 3]}, "opts: SEED is set by the grid"),
        ({"opts": "A 3"}, "opts: give pairs"),
        ({"learning_rates": []}, "learning_rates: give a list"),
        ({"learning_rates": [0]}, "learning_rates: 0 is not a positive number"),
        ({"learning_rates": ["fast"]}, "learning_rates: 'fast' is not a positive"),
        ({"learning_rates": [float("nan")]}, "learning_rates: nan is not a positive"),
        ({"learning_rates": [0.02, "2e-2"]}, "learning_rates: 0.02 is given twice"),
        ({"seeds": 1}, "seeds: give a list"),
        ({"seeds": [1, 2, 1]}, "seeds: 1 is given twice"),
        ({"seeds": [-1]}, "seeds: -1 is not a whole number"),
        ({"seeds": [True]}, "seeds: True is not a whole number"),
        ({"seeds": [1.5]}, "seeds: 1.5 is not a whole number"),
    ],
)
def test_wrong_study_names_file_and_key(write_study, changes, message):
    with pytest.raises(InputError, match=message) as error:
        load_study(write_study(**changes))
    assert str(error.value).startswith("study.yaml: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arms: {a: 1, a: 2}", "the key 'a' is given twice"),
        ("arms: [", "not valid YAML"),
        ("", "give the keys"),
        ("? [a]\n: 1", "give the keys|not valid YAML|unknown key"),
    ],
)
def test_wrong_yaml_is_one_line(tmp_path, text, message):
    file = tmp_path / "study.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_study(file)
    assert "\n" not in str(error.value)


def test_missing_study_file(tmp_path):
    with pytest.raises(InputError, match="no study file"):
        load_study(tmp_path / "gone.yaml")


def test_the_published_grid_has_every_l2_eps_of_both_families():
    for arch in ("resnet50", "wide_resnet50_2"):
        study = load_study(f"configs/study/paper_coco_{arch}.yaml")
        weights = [arm.weights for arm in study.arms]
        assert weights == [f"robust://{entry.name}.pkl" for entry in zoo.list(norm="l2", arch=arch)]
        assert study.opts == ("MODEL.ROBUST.ARCH", arch)
        assert len(study.trials()) == 10 * 2 * 4
