import json
from pathlib import Path

import pytest

from rt_detectron.checkpoint import zoo
from rt_detectron.study.grid import Trial
from rt_detectron.study.load import described_study, load_study
from rt_detectron.utils.errors import InputError

REPOSITORY = Path(__file__).parents[2]


def test_weights_behind_a_scheme_are_not_looked_for(write_study):
    study = load_study(write_study(arms={"standard": {"weights": "robust://resnet50_l2_eps0.pkl"}}))
    assert study.arms[0].checkpoints[0].weights_sha256 is None


def test_weights_may_carry_detectron2_options(write_study):
    study = load_study(write_study(arms={"standard": {"weights": "std.pkl?matching_heuristics=True"}}))
    assert study.arms[0].weights == "std.pkl?matching_heuristics=True"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "sedes: unknown key; known are name, baseline, arms"),
        ({"seeds": None}, "seeds: this key is missing"),
        ({"name": " "}, "name: give the study a name"),
        ({"baseline": "vanilla"}, "baseline: 'vanilla' is not an arm; arms are standard, l2"),
        ({"baseline": ["standard"]}, "baseline: Cannot convert .* to string"),
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
            "arms.standard.eps: -1.0 is not 0 or a pos",
        ),
        ({"arms": {}}, "arms: give at least one"),
        ({"arms": ["standard"]}, "arms: .*list is not"),
        ({"arms": {"<script>": {"weights": "std.pkl"}}}, "arms: the name '<script>' becomes a folder"),
        ({"arms": {"..": {"weights": "std.pkl"}}}, "arms: the name '..' becomes a folder"),
        ({"arms": {"a/b": {"weights": "std.pkl"}}}, "arms: the name 'a/b' becomes a folder"),
        ({"arms": {18: {"weights": "std.pkl"}}}, r"arms.18: Key 18 \(int\) is incompatible"),
        ({"arms": {"standard": "std.pkl"}}, "arms.standard: .*str is not .* value: std.pkl"),
        (
            {"arms": {"standard": {"wieghts": "std.pkl"}}},
            "arms.standard.wieghts: unknown key; known are weights",
        ),
        ({"arms": {"standard": {"weights": "gone.pkl"}}}, "arms.standard.weights: no file gone.pkl"),
        (
            {"arms": {"standard": {"weights": None}}},
            "arms.standard.weights: give a path, a path with {seed} in it, or a list of paths, got None",
        ),
        ({"arms": {"standard": {"weights": ""}}}, "arms.standard.weights: give a path"),
        ({"arms": {"standard": {"opts": []}}}, "arms.standard.weights: this key is missing"),
        ({"detectors": {"mask": {"config": "gone.yaml"}}}, "detectors.mask.config: no file gone.yaml"),
        ({"detectors": {"mask": {"config": "mask.yaml", "opts": ["A"]}}}, "detectors.mask.opts: give pairs"),
        ({"opts": ["SEED", 3]}, "opts: SEED is set by seeds"),
        ({"evaluations": {"attack": ["A"]}}, "evaluations.attack: give pairs"),
        ({"evaluations": ["A"]}, "evaluations: Cannot merge"),
        ({"evaluations": {}}, "evaluations: give at least one, as NAME"),
        (
            {"evaluations": {"a": ["A", 1], "b": ["A", 2]}},
            "evaluations.b: A is set by evaluations.a",
        ),
        ({"evaluations": {"a": ["MODEL.WEIGHTS", "x"]}}, "evaluations.a: MODEL.WEIGHTS is set by"),
        ({"selection": [1]}, "selection: .*list is not"),
        (
            {"selection": {"opts": ["DATASETS.TEST", "x"]}},
            "selection.opts: DATASETS.TEST is set by the selection",
        ),
        ({"selection": {"seed": [1]}}, "selection.seed: unknown key; known are seeds, opts"),
        ({"resources": {"cpus": 0}}, "resources.cpus: 0 is not a whole number from 1"),
        (
            {"resources": {"gpus": 1.5}},
            "resources.gpus: 1.5 is neither a whole number of GPUs nor a",
        ),
        (
            {"resources": {"gpus": "two"}},
            "resources.gpus: Value 'two' of type 'str' could not",
        ),
        ({"margin": 0}, "margin: 0.0 is not a positive number"),
        ({"keep_checkpoints": "maybe"}, "keep_checkpoints: Value 'maybe'"),
        ({"retries": -1}, "retries: -1 is not a whole number"),
        ({"opts": "A 3"}, "opts: .*is not .*list"),
        ({"learning_rates": []}, "learning_rates: give at least one number"),
        ({"learning_rates": [0]}, "learning_rates: 0.0 is not a positive number"),
        (
            {"learning_rates": ["fast"]},
            r"learning_rates\[0\]: Value 'fast' of type 'str' could not",
        ),
        ({"learning_rates": [float("nan")]}, "learning_rates: nan is not a positive"),
        ({"learning_rates": [0.02, "2e-2"]}, "learning_rates: 0.02 is given twice"),
        ({"seeds": 1}, "seeds: .*is not .*list"),
        ({"seeds": [1, 2, 1]}, "seeds: 1 is given twice"),
        ({"seeds": [-1]}, "seeds: -1 is not a whole number"),
        ({"seeds": [True]}, r"seeds\[0\]: Value 'True' of type 'bool' could not be converted to Integer"),
        ({"seeds": [1.5]}, r"seeds\[0\]: Value '1.5' of type 'float' could not be converted to Integer"),
    ],
)
def test_wrong_study_names_file_and_key(write_study, changes, message):
    with pytest.raises(InputError, match=message) as error:
        load_study(write_study(**changes))
    assert str(error.value).startswith("study.yaml: ")
    assert "\n" not in str(error.value)


def test_several_checkpoints_are_one_arm(write_study, tmp_path):
    for seed in (10, 2):
        (tmp_path / f"eps3_seed{seed}.pkl").write_text(str(seed))
    (tmp_path / "eps3_seedx.pkl").touch()
    arms = {"standard": {"weights": ["std.pkl", "l2.pkl"]}, "robust": {"weights": "eps3_seed{seed}.pkl"}}
    study = load_study(write_study(arms=arms, learning_rates=[0.01]))
    assert [[(c.name, c.weights) for c in arm.checkpoints] for arm in study.arms] == [
        [("1", "std.pkl"), ("2", "l2.pkl")],
        [("2", "eps3_seed2.pkl"), ("10", "eps3_seed10.pkl")],
    ]
    trials = study.final_trials()
    assert len(trials) == study.count_trials() == 2 * 2 * 2
    assert {trial.name for trial in trials if trial.arm == "robust"} == {
        f"robust/mask/lr0.01/checkpoint{checkpoint}-seed{seed}" for checkpoint in (2, 10) for seed in (1, 2)
    }
    assert {trial.weights_sha256 for trial in trials} == {
        checkpoint.weights_sha256 for arm in study.arms for checkpoint in arm.checkpoints
    }
    selection = load_study(write_study(arms=arms)).selection_trials()
    assert {(t.seed, t.checkpoint) for t in selection if t.arm == "robust"} == {(1, "2"), (2, "10")}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("gone_{seed}.pkl", "no file gone_1.pkl, nor of another seed"),
        ([], "give a path, a path with {seed} in it, or a list of paths"),
        (["std.pkl", "gone.pkl"], "no file gone.pkl"),
        (["std.pkl", "std.pkl"], "std.pkl is given twice"),
        ([1], "or a list of paths"),
    ],
)
def test_checkpoints_that_are_not_there(write_study, weights, message):
    with pytest.raises(InputError, match=f"study.yaml: arms.standard.weights: .*{message}"):
        load_study(write_study(arms={"standard": {"weights": weights}}))


def test_arms_have_checkpoints_of_the_same_seeds(write_study, tmp_path):
    for name in ("eps0_seed1", "eps0_seed2", "eps3_seed2"):
        (tmp_path / f"{name}.pkl").write_text(name)
    arms = {"standard": {"weights": "eps0_seed{seed}.pkl"}, "robust": {"weights": "eps3_seed{seed}.pkl"}}
    message = r"arms.robust.weights: there are files of \{seed\} 2, but 1, 2 of arms.standard; finish the"
    with pytest.raises(InputError, match=message):
        load_study(write_study(arms=arms))
    (tmp_path / "eps3_seed1.pkl").touch()
    assert [len(arm.checkpoints) for arm in load_study(write_study(arms=arms)).arms] == [2, 2]


def test_a_study_is_read_from_its_description_without_its_files(write_study, tmp_path):
    arms = {"standard": {"weights": ["std.pkl", "l2.pkl"], "eps": 0}, "l2": {"weights": "l2.pkl"}}
    study = load_study(write_study(arms=arms, margin=0.3, evaluations={"attack": ["A.X", [1, 2]]}))
    content = json.loads(json.dumps(study.description()))
    for path in tmp_path.glob("*.*"):
        path.unlink()
    assert described_study(content) == study
    with pytest.raises(InputError, match="describes no study"):
        described_study({"kind": "detectors"})


@pytest.mark.parametrize("name", ["coco-subset", "transfer"])
def test_the_descriptions_of_shipped_results_are_read(name):
    content = json.loads((REPOSITORY / "docs/results" / name / "results.json").read_text())
    study = described_study(content["study"])
    assert study.name == content["study"]["name"]
    trials = [Trial.from_specification(trial) for trial in content["trials"]]
    assert {trial.name for trial in trials} == {trial["name"] for trial in content["trials"]}
    assert {trial.name for trial in study.selection_trials()} == {
        t.name for t in trials if t.stage == "selection"
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arms: {a: 1, a: 2}", "arms.a: this key is given twice"),
        ("arms: [", "not valid YAML"),
        ("", "give some of the keys name, baseline"),
        ("? [a]\n: 1", "not valid YAML"),
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transfers: {cifar10": "transfer: {cifar10"}, "transfer: unknown key;"),
        (
            {"transfers: {cifar10": "detectors: {a: {config: fixed.py}}\ntransfers: {cifar10"},
            "got detectors and transfers",
        ),
        ({"transfers: {cifar10": "other: {cifar10"}, "other: unknown key"),
        ({"config: fixed.py": "config: broken.py"}, "broken.py is no config file"),
        ({"dataset.name,": "optimizer.lr,"}, "optimizer.lr is set by learning_rates"),
        ({"retries: 0": "evaluations: {a: [b, 1]}"}, "only studies of detectors have them"),
    ],
)
def test_what_is_wrong_in_a_transfer_study_is_one_line(make_transfer_study, tmp_path, changes, words):
    make_transfer_study()
    (tmp_path / "broken.py").write_text("dataset = (")
    text = (tmp_path / "study.yaml").read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(InputError, match=words) as error:
        load_study("study.yaml")
    assert "\n" not in str(error.value)


def test_a_study_needs_targets(make_transfer_study, tmp_path):
    make_transfer_study()
    text = (tmp_path / "study.yaml").read_text()
    (tmp_path / "study.yaml").write_text("\n".join(x for x in text.splitlines() if "transfers" not in x))
    with pytest.raises(InputError, match="give one of the keys detectors, transfers, got none"):
        load_study("study.yaml")


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
    assert study.count_trials() == 40 * 24 * (3 * 2 + 3)
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
    assert len(study.selection_trials()) == 108
    assert study.count_trials() == 144
    variants = {trial.opts[trial.opts.index("DATASETS.TEST") + 1] for trial in study.possible_trials()[108:]}
    assert variants == {"('coco_2017_val@person',)", "('coco_2017_val@any',)", "('coco_2017_val',)"}


def test_numbers_may_be_written_in_ways_yaml_takes_for_text(write_study):
    study = load_study(write_study(learning_rates=["1e-2", 1, 0.5], resources={"gpus": 1}))
    assert study.learning_rates == (0.01, 1.0, 0.5)
    assert study.resources.gpus == 1.0


def test_opts_stay_as_yaml_reads_them(write_study):
    """They are part of trial.json: another reading would not resume what an earlier version has trained."""
    name = write_study(opts=None)
    with open(name, "a") as stream:
        stream.write("opts: [A, 1e-4, B, null, C, [1, 2.0, x], D, 0x10]\n")
    assert load_study(name).opts == ("A", "1e-4", "B", "None", "C", "[1, 2.0, 'x']", "D", "16")
