import json
from pathlib import Path

import pytest
import yaml

from rt_detectron.checkpoint import zoo
from rt_detectron.study.grid import load_study
from rt_detectron.utils.errors import InputError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def write_study(tmp_path, monkeypatch):
    """Writes study.yaml, valid but for the given changes (None removes a key); gives its name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "std.pkl").write_bytes(b"standard")
    (tmp_path / "l2.pkl").write_bytes(b"robust")
    (tmp_path / "base.yaml").write_text("DATASETS:\n  TRAIN: ('a_train', 'b')\n")
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


def test_specification_survives_json(write_study):
    specification = load_study(write_study()).selection_trials()[0].specification()
    assert json.loads(json.dumps(specification)) == specification


@pytest.mark.parametrize(
    ("file", "key"),
    [("std.pkl", "weights_sha256"), ("mask.yaml", "config_sha256"), ("base.yaml", "config_sha256")],
)
def test_specification_notices_changed_files(write_study, tmp_path, file, key):
    before = load_study(write_study()).selection_trials()[0].specification()
    with (tmp_path / file).open("a") as stream:
        stream.write("\nX: 1\n")
    after = load_study("study.yaml").selection_trials()[0].specification()
    assert [name for name in before if before[name] != after[name]] == [key]


def test_weights_behind_a_scheme_are_not_looked_for(write_study):
    study = load_study(write_study(arms={"standard": {"weights": "robust://resnet50_l2_eps0.pkl"}}))
    assert study.arms[0].weights_sha256 is None


def test_weights_may_carry_detectron2_options(write_study):
    study = load_study(write_study(arms={"standard": {"weights": "std.pkl?matching_heuristics=True"}}))
    assert study.arms[0].weights == "std.pkl?matching_heuristics=True"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "unknown key sedes"),
        ({"seeds": None}, "key seeds is missing"),
        ({"name": " "}, "name: write a few words"),
        ({"baseline": "vanilla"}, "baseline: 'vanilla' is not an arm; arms are standard, l2"),
        ({"baseline": ["standard"]}, "baseline: .* is not an arm"),
        (
            {"baseline": "l2", "arms": {"l2": {"weights": "l2.pkl", "baseline": "x"}}},
            "arms.l2.baseline: 'x' is not",
        ),
        (
            {"arms": {"standard": {"weights": "l2.pkl", "baseline": "b"}, "b": {"weights": "l2.pkl"}}},
            "baseline: standard itself is compared with b: give arms.standard.baseline: standard",
        ),
        (
            {"arms": {"standard": {"weights": "std.pkl", "eps": -1}}},
            "arms.standard.eps: -1 is not 0 or a pos",
        ),
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
        ({"opts": ["SEED", 3]}, "opts: SEED is set by seeds"),
        ({"evaluations": {"attack": ["A"]}}, "evaluations.attack: give pairs"),
        ({"evaluations": ["A"]}, "evaluations: give at least one, as NAME"),
        (
            {"evaluations": {"a": ["A", 1], "b": ["A", 2]}},
            "evaluations.b: A is set by study.yaml: evaluations.a",
        ),
        ({"evaluations": {"a": ["MODEL.WEIGHTS", "x"]}}, "evaluations.a: MODEL.WEIGHTS is set by"),
        ({"selection": [1]}, "selection: give the keys opts, seeds"),
        (
            {"selection": {"opts": ["DATASETS.TEST", "x"]}},
            "selection.opts: DATASETS.TEST is set by the selection",
        ),
        ({"selection": {"seed": [1]}}, "selection: unknown key seed"),
        ({"resources": {"cpus": 0}}, "resources.cpus: 0 is not a whole number from 1"),
        ({"resources": {"gpus": 1.5}}, "resources.gpus: 1.5 is neither a whole number of GPUs nor a part"),
        ({"resources": {"gpus": "two"}}, "resources.gpus: 'two' is not 0 or a positive number"),
        ({"retries": -1}, "retries: -1 is not a whole number"),
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


@pytest.mark.parametrize("seeds", [None, [3, 4]])
def test_selection_trains_and_scores_within_the_training_set(write_study, seeds):
    selection = {"opts": ["A.E", 9], **({"seeds": seeds} if seeds else {})}
    study = load_study(write_study(selection=selection, evaluations={"attack": ["TEST.ATTACK.STEPS", 5]}))
    trials = study.selection_trials()
    assert [trial.name for trial in trials[:3]] == [
        f"standard/mask/lr0.02/selection-seed{(seeds or [1])[0]}",
        f"standard/mask/lr0.01/selection-seed{(seeds or [1])[0]}",
        f"l2/mask/lr0.02/selection-seed{(seeds or [1])[0]}",
    ]
    assert len({trial.name for trial in trials}) == len(trials) == 2 * 2 * len(seeds or [1])
    expected = (
        "A.E 9 DATASETS.TRAIN ('a_train@fit', 'b@fit') DATASETS.TEST ('a_train@held_out', 'b@held_out')"
    )
    assert all(" ".join(trial.opts).endswith(expected) for trial in trials)
    assert {trial.evaluations for trial in trials} == {()}
    assert {trial.evaluations for trial in study.possible_trials()[len(trials) :]} == {
        ("TEST.ATTACK.STEPS", "5")
    }


@pytest.mark.parametrize(
    ("given", "expected"), [("('c@person',)", "('c@person@fit',)"), (["c", "d"], "('c@fit', 'd@fit')")]
)
def test_selection_takes_the_training_set_of_the_opts_first(write_study, given, expected):
    study = load_study(write_study(opts=["DATASETS.TRAIN", given]))
    opts = study.selection_trials()[0].opts
    assert opts[len(opts) - opts[::-1].index("DATASETS.TRAIN")] == expected


def test_selection_without_a_training_set(write_study, tmp_path):
    name = write_study()
    (tmp_path / "base.yaml").write_text("A: 1\n")
    with pytest.raises(InputError, match=r"detectors.mask: .* DATASETS.TRAIN must be given in mask.yaml"):
        load_study(name).selection_trials()


def test_final_trials_are_those_with_a_rate_chosen(write_study):
    study = load_study(write_study())
    trials = study.final_trials({("standard", "mask"): 0.01})
    assert [trial.name for trial in trials] == ["standard/mask/lr0.01/seed1", "standard/mask/lr0.01/seed2"]
    assert study.final_trials({}) == []
    assert study.count_trials() == 4 + 4


def test_one_rate_needs_no_selection(write_study):
    study = load_study(write_study(learning_rates=[0.02], selection={"seeds": [5]}))
    assert study.selection_trials() == []
    assert [trial.name for trial in study.final_trials({})] == [
        "standard/mask/lr0.02/seed1",
        "l2/mask/lr0.02/seed1",
        "standard/mask/lr0.02/seed2",
        "l2/mask/lr0.02/seed2",
    ]


def test_an_arm_may_have_a_baseline_of_its_own(write_study):
    arms = {
        "a": {"weights": "std.pkl"},
        "b": {"weights": "l2.pkl", "eps": 0.5},
        "c": {"weights": "std.pkl", "eps": 0, "baseline": "c"},
        "d": {"weights": "l2.pkl", "eps": "5e-1", "baseline": "c"},
    }
    study = load_study(write_study(arms=arms, baseline="a"))
    assert [study.baseline_of(name) for name in "abcd"] == ["a", "a", "c", "c"]
    assert [arm.eps for arm in study.arms] == [None, 0.5, 0.0, 0.5]


def test_the_published_grid_has_every_l2_eps_of_both_families():
    study = load_study("configs/study/paper_coco.yaml")
    archs = ("resnet50", "wide_resnet50_2")
    entries = [entry for arch in archs for entry in zoo.list(norm="l2", arch=arch)]
    assert [arm.weights for arm in study.arms] == [f"robust://{entry.name}.pkl" for entry in entries]
    assert [arm.eps for arm in study.arms] == [entry.eps for entry in entries]
    assert [study.baseline_of(arm.name) for arm in study.arms] == [
        f"{arch}_l2_eps0" for arch in archs for _ in range(10)
    ]
    assert [arm.opts for arm in study.arms] == [("MODEL.ROBUST.ARCH", entry.arch) for entry in entries]
    assert len(study.seeds) == 4
    assert len(study.targets) == 2


def test_the_published_transfers_are_every_eps_of_four_widths_to_twelve_sets():
    study = load_study("configs/study/paper_transfer.yaml")
    assert study.count_trials() == 4800
    tops = {f"robust://{entry.name}.pkl": entry.top1 for entry in zoo.list(norm="l2")}
    assert [arm.source_accuracy for arm in study.arms] == [tops[arm.weights] for arm in study.arms]
    granularity = load_study("configs/study/paper_transfer_granularity.yaml")
    names = {target.name for target in granularity.targets}
    assert {name.removesuffix("-32px") for name in names if name.endswith("-32px")} == {
        name for name in names if not name.endswith("-32px")
    }


def test_the_shipped_subset_study_is_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    for name in ("eps0", "l2_eps0.1", "l2_eps0.25", "l2_eps0.5"):
        folder = tmp_path / f"output/coco_subset/resnet18_{name}"
        folder.mkdir(parents=True)
        (folder / "backbone.pkl").touch()
    study = load_study("configs/study/coco_subset.yaml")
    assert len(study.selection_trials()) == 36
    assert study.count_trials() == 72
    variants = {trial.opts[trial.opts.index("DATASETS.TEST") + 1] for trial in study.possible_trials()[36:]}
    assert variants == {"('coco_2017_val@person',)", "('coco_2017_val@any',)", "('coco_2017_val',)"}
