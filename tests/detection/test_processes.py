"""Two processes train the same weights, and those of one process on the same images."""

import json
from pathlib import Path

import pytest
import torch
from small_detectors import RETINANET, SMALL, differences
from tool_process import run_tool

PROGRAM = str(Path(__file__).parents[1] / "helpers" / "detection_variants.py")
FEW = {
    "average": {**SMALL, "SOLVER.EMA": 0.5, "SOLVER.CHECKPOINT_PERIOD": 2},
    "adversarial": {
        **SMALL,
        "SOLVER.ADVERSARIAL.REPLAYS": 3,
        "SOLVER.ADVERSARIAL.LOSS": "A_box",
        "SOLVER.ADVERSARIAL.CARRY_OVER": True,
        "SOLVER.CHECKPOINT_PERIOD": 2,
    },
    "pgd": {
        **SMALL,
        "SOLVER.ADVERSARIAL.STEPS": 1,
        "SOLVER.ADVERSARIAL.LOSS": "MTD",
        "SOLVER.ADVERSARIAL.WARMUP": 0.5,
        "SOLVER.CHECKPOINT_PERIOD": 2,
    },
    "rates": {
        "SOLVER.BACKBONE_MULTIPLIER": 0.1,
        "MODEL.BACKBONE.FREEZE_AT": 2,
        "SOLVER.ADVERSARIAL.STEPS": 1,
        "SOLVER.ADVERSARIAL.LOSS": "A_cls",
    },
}
ALL = {
    "no clipping": {**SMALL, "SOLVER.CLIP_GRADIENTS.ENABLED": False},
    "frozen": {"MODEL.BACKBONE.FREEZE_AT": 5},
    "batch norm": {"MODEL.RESNETS.NORM": "BN", "MODEL.FPN.NORM": "BN", "SOLVER.EMA": 0.5},
    "precise batch norm": {**SMALL, "TEST.PRECISE_BN.ENABLED": True, "TEST.PRECISE_BN.NUM_ITER": 2},
    "synchronised batch norm": {"MODEL.RESNETS.NORM": "naiveSyncBN"},
    "retinanet": {**RETINANET, "SOLVER.CHECKPOINT_PERIOD": 2},
    "statistics stay": {"MODEL.RESNETS.NORM": "EvalBN"},
    "one norm of all gradients": {
        **SMALL,
        "SOLVER.CLIP_GRADIENTS.ENABLED": True,
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.5,
    },
    "adamw": {
        "MODEL.BACKBONE.NAME": "build_robust_timm_fpn_backbone",
        "MODEL.ROBUST.ARCH": "timm/convnext_atto",
        "MODEL.WEIGHTS": "",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "SOLVER.OPTIMIZER": "ADAMW",
        "SOLVER.BASE_LR": 0.0001,
        "SOLVER.LAYER_DECAY": 0.7,
        "SOLVER.CHECKPOINT_PERIOD": 2,
    },
    "frozen, features kept": {
        "MODEL.BACKBONE.FREEZE_AT": 5,
        "DATALOADER.FEATURE_CACHE_GB": 0.01,
        "SOLVER.CHECKPOINT_PERIOD": 2,
    },
    "replays that are clipped, late, and counted": {
        **SMALL,
        "SOLVER.MAX_ITER": 2,
        "SOLVER.ADVERSARIAL.REPLAYS": 2,
        "SOLVER.ADVERSARIAL.COUNT_BATCHES": True,
        "SOLVER.ADVERSARIAL.CLIP": 1.0,
        "SOLVER.ADVERSARIAL.CLEAN": 0.25,
        "SOLVER.ADVERSARIAL.WARMUP": 0.5,
        "SOLVER.ADVERSARIAL.NORM": "linf",
        "SOLVER.ADVERSARIAL.EPS": 4.0,
    },
    "pgd from the image, evaluated under attack": {
        **SMALL,
        "SOLVER.ADVERSARIAL.STEPS": 2,
        "SOLVER.ADVERSARIAL.STEP_SIZE": 0.2,
        "SOLVER.ADVERSARIAL.START": "image",
        "SOLVER.ADVERSARIAL.EVAL_IMAGES": 3,
        "TEST.EVAL_PERIOD": 2,
    },
    "scaled": {
        **SMALL,
        "SOLVER.REFERENCE_WORLD_SIZE": 1,
        "SOLVER.IMS_PER_BATCH": 1,
        "SOLVER.MAX_ITER": 8,
        "SOLVER.WARMUP_ITERS": 0,
    },
    # No layer of the pyramid may be without gradients: the other process would wait for them.
    "retinanet on a simple pyramid": {
        **RETINANET,
        "MODEL.WEIGHTS": "",
        "MODEL.BACKBONE.NAME": "build_retinanet_robust_timm_sfp_backbone",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.ROBUST.ARCH": "timm/vit_tiny_patch16_224:depth=3",
    },
    "everything": {
        "MODEL.RESNETS.NORM": "BN",
        "SOLVER.EMA": 0.5,
        "SOLVER.ADVERSARIAL.REPLAYS": 3,
        "SOLVER.BACKBONE_MULTIPLIER": 0.1,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "DATALOADER.NUM_WORKERS": 1,
        "DATALOADER.ASPECT_RATIO_GROUPING": True,
        "SOLVER.IMS_PER_BATCH": 4,
    },
}


# What one process needs to be told to do as two.
ALONE = {
    "scaled": {
        "SOLVER.REFERENCE_WORLD_SIZE": 0,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 4,
        "SOLVER.BASE_LR": 0.002,
    }
}

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def farthest(one: dict, other: dict, names) -> float:
    return max((one[name].float() - other[name].float()).abs().max().item() for name in names)


@pytest.mark.parametrize(
    "variants", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few options", "all options"]
)
def test_two_processes_train_as_one(tool_server, tiny_opts, tmp_path, variants):
    tiny = dict(zip(tiny_opts[::2], tiny_opts[1::2], strict=True))
    for how, told in (("together", {}), ("alone", ALONE)):
        options = {name: {**tiny, **chosen, **told.get(name, {})} for name, chosen in variants.items()}
        (tmp_path / how).mkdir()
        ended = run_tool([PROGRAM, how, tmp_path / how, json.dumps(options)], tmp_path)
        assert ended.returncode == 0, ended.stderr
    for name, chosen in variants.items():
        folder = tmp_path / "together" / name
        first, second = (torch.load(folder / f"{rank}.pth", weights_only=True) for rank in (0, 1))
        learned = [key for key in first["weights"] if not key.endswith(STATISTICS)]
        for key in learned:
            assert torch.equal(first["weights"][key], second["weights"][key]), (name, key)
        # Both evaluated what was saved.
        saved_name = "uninterrupted.pth" if "SOLVER.CHECKPOINT_PERIOD" in chosen else "model_final.pth"
        saved = torch.load(folder / saved_name, weights_only=True)
        assert not differences(dict(saved["model"]), dict(first["evaluated"])), name
        assert not differences(dict(saved["model"]), dict(second["evaluated"])), name
        if "SOLVER.CHECKPOINT_PERIOD" in chosen:
            resumed = torch.load(folder / "model_final.pth", weights_only=True)
            assert not differences(saved, resumed), name
        # One process has no other to synchronise with. RetinaNet's running mean is each process's own, and
        # so are batch norm's statistics, which PGD on the detector in eval mode depends on.
        is_pgd_with_statistics = "SOLVER.ADVERSARIAL.STEPS" in chosen and SMALL.items() <= chosen.items()
        if is_pgd_with_statistics or {"naiveSyncBN", "RetinaNet"} & {str(v) for v in chosen.values()}:
            continue
        alone = torch.load(tmp_path / "alone" / name / "0.pth", weights_only=True)
        moved = farthest(first["start"], first["weights"], learned)
        assert farthest(first["weights"], alone["weights"], learned) < 1e-3 * moved, name
