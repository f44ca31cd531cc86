"""Detectron2's ResNet, built as torchvision lays it out and selected by one name."""

import logging
from collections.abc import Mapping

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
    ResNet,
)
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.roi_heads import Res5ROIHeads

from rt_detectron.checkpoint.architectures import ARCHITECTURES, RESNET, Architecture, get_architecture
from rt_detectron.checkpoint.weights import check_config
from rt_detectron.layers.eval_norm import keep_statistics
from rt_detectron.utils.errors import InputError

logger = logging.getLogger(__name__)

RESNETS = {name: known for name, known in ARCHITECTURES.items() if known.family is RESNET}
# What all of them have: the stride of a bottleneck sits on its 3x3 convolution, and the stem is one
# 7x7 convolution of 64 channels (DeepLab's configs ask for another).
ALWAYS = {"STRIDE_IN_1X1": False, "STEM_OUT_CHANNELS": 64}

TIMM_KEYS = {"OUT_NORM": "", "WINDOW": 0}  # of MODEL.ROBUST, and what switches them off


def refuse_timm_keys(cfg: CfgNode, arch: str) -> None:
    """Raise :class:`InputError` for keys of MODEL.ROBUST that only timm's networks can follow."""
    robust = cfg.MODEL.ROBUST if "ROBUST" in cfg.MODEL else {}
    for key, off in TIMM_KEYS.items():
        if robust.get(key, off) != off:
            raise InputError(f"MODEL.ROBUST.{key} is for timm's networks, {arch} is none: set it to {off!r}")


def resolve_resnet(cfg: CfgNode) -> CfgNode:
    """A copy of ``cfg`` whose ``MODEL.RESNETS`` describes the chosen network.

    The network is ``MODEL.ROBUST.ARCH`` if that key exists and is not empty; otherwise it is read off
    ``MODEL.RESNETS``. Under a given ARCH, a RESNETS key that still holds Detectron2's default counts as
    not set, and what the networks of the table have in common (:data:`ALWAYS`) is not asked of the config.

    Raises:
        InputError: for an unknown ARCH, for MODEL.RESNETS that describe none of the known networks or
            another one than ARCH, and for a dilated res5 (DC5) without bottlenecks.
    """
    architecture = _chosen(cfg) or _described(cfg)
    architecture.check_family(RESNET)
    arch, needed = architecture.name, architecture.resnets
    refuse_timm_keys(cfg, arch)
    _refuse_disagreement(cfg, arch, needed)
    if (cfg.MODEL.RESNETS.RES5_DILATION != 1 or _is_deeplab(cfg)) and not _has_bottlenecks(needed):
        raise InputError(
            f"a dilated res5 (DC5, DeepLab) needs a bottleneck network, {arch} has none: "
            "choose resnet50 or larger, or an FPN detector"
        )
    resolved = cfg.clone()
    resolved.defrost()
    resolved.MODEL.RESNETS.update(needed, **ALWAYS)
    if _is_deeplab(cfg):
        resolved.MODEL.RESNETS.STEM_TYPE = "basic"
    described = ", ".join(f"{key} {value}" for key, value in needed.items())
    logger.info(
        "building %s (MODEL.RESNETS: %s, STRIDE_IN_1X1 False, NORM %s)",
        arch,
        described,
        cfg.MODEL.RESNETS.NORM,
    )
    return resolved


@BACKBONE_REGISTRY.register()
def build_robust_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ResNet, dilated as DeepLab's in a DeepLab config; :func:`resolve_resnet` says which one.

    A C4 head builds its res5 from MODEL.RESNETS itself, after the backbone and from the same ``cfg``: there
    the resolved keys are written into ``cfg``, so that both are stages of one network.

    Raises:
        InputError: as :func:`resolve_resnet`, and under a C4 head for a network without bottlenecks, and for
            EvalBN, which Detectron2's head does not know.
    """
    resolved = resolve_resnet(cfg)
    check_config(
        cfg, resolved.MODEL.RESNETS.STRIDE_IN_1X1 if _has_bottlenecks(resolved.MODEL.RESNETS) else None
    )
    if cfg.MODEL.RESNETS.NORM == "EvalBN":
        if has_c4_head(cfg):
            raise InputError(
                f"MODEL.RESNETS.NORM EvalBN: {cfg.MODEL.ROI_HEADS.NAME} (C4) takes FrozenBN or BN"
            )
        resolved.MODEL.RESNETS.NORM = "BN"
        return keep_statistics(_build(resolved, input_shape))
    if has_c4_head(cfg):
        _complete_for_c4_head(cfg, resolved)
    return _build(resolved, input_shape)


def _build(resolved: CfgNode, input_shape: ShapeSpec) -> ResNet:
    if _is_deeplab(resolved):
        from detectron2.projects.deeplab import build_resnet_deeplab_backbone

        return build_resnet_deeplab_backbone(resolved, input_shape)
    return build_resnet_backbone(resolved, input_shape)


def _chosen(cfg: CfgNode) -> Architecture | None:
    # Projects that only `import rt_detectron` have no MODEL.ROBUST: add_robust_config makes it.
    arch = cfg.MODEL.ROBUST.ARCH if "ROBUST" in cfg.MODEL else ""
    return get_architecture(arch) if arch else None


def _is_deeplab(cfg: CfgNode) -> bool:
    """Whether ``cfg`` has the keys of add_deeplab_config, which only DeepLab's own builder heeds."""
    return "RES5_MULTI_GRID" in cfg.MODEL.RESNETS


def _has_bottlenecks(resnets: Mapping[str, int]) -> bool:
    return resnets["DEPTH"] >= 50


def _lines(values: dict) -> str:
    """``values`` as they are typed behind a Detectron2 command."""
    return " ".join(f"MODEL.RESNETS.{key} {value}" for key, value in values.items())


def _described(cfg: CfgNode) -> Architecture:
    resnets = cfg.MODEL.RESNETS
    for architecture in RESNETS.values():
        if all(resnets[key] == value for key, value in architecture.resnets.items()):
            return architecture
    found = _lines({key: resnets[key] for key in RESNETS["resnet50"].resnets})
    same_depth = [
        f"{_lines(architecture.resnets)} ({name})"
        for name, architecture in RESNETS.items()
        if architecture.resnets["DEPTH"] == resnets.DEPTH
    ]
    way_out = f"set {' or '.join(same_depth)}, or" if same_depth else "set"
    raise InputError(
        f"{found} is none of the known networks: {way_out} MODEL.ROBUST.ARCH to one of {', '.join(RESNETS)}"
    )


def _refuse_disagreement(cfg: CfgNode, arch: str, needed: dict[str, int]) -> None:
    default = get_cfg().MODEL.RESNETS
    wrong = {
        key: value for key, value in needed.items() if cfg.MODEL.RESNETS[key] not in (value, default[key])
    }
    if wrong:
        found = _lines({key: cfg.MODEL.RESNETS[key] for key in wrong})
        raise InputError(f"MODEL.ROBUST.ARCH {arch} disagrees with {found}: set {_lines(wrong)}")


def has_c4_head(cfg: CfgNode) -> bool:
    meta_arch, heads = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NAME
    return (
        meta_arch in META_ARCH_REGISTRY
        and heads in ROI_HEADS_REGISTRY
        and issubclass(META_ARCH_REGISTRY.get(meta_arch), GeneralizedRCNN)
        and issubclass(ROI_HEADS_REGISTRY.get(heads), Res5ROIHeads)
    )


def _complete_for_c4_head(cfg: CfgNode, resolved: CfgNode) -> None:
    needed = {key: resolved.MODEL.RESNETS[key] for key in (*RESNETS["resnet50"].resnets, *ALWAYS)}
    if not _has_bottlenecks(needed):
        raise InputError(
            f"{cfg.MODEL.ROI_HEADS.NAME} (C4) needs a bottleneck network, DEPTH {needed['DEPTH']} has none: "
            "choose resnet50 or larger, or an FPN detector"
        )
    missing = {key: value for key, value in needed.items() if cfg.MODEL.RESNETS[key] != value}
    if missing:
        logger.info("completing the config for %s (C4): %s", cfg.MODEL.ROI_HEADS.NAME, _lines(missing))
        frozen = cfg.is_frozen()
        cfg.defrost()
        cfg.MODEL.RESNETS.update(missing)
        if frozen:
            cfg.freeze()
