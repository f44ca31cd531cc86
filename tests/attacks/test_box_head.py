"""The published objectives, against loops over proposals and pixels that share no code with them."""

import zlib
from dataclasses import replace

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from rt_detectron.attacks import PGD, RandomNoise, ThreatModel, build_detector_attack
from rt_detectron.attacks.box_head import clip_proposal_losses, inverse_frequency
from rt_detectron.attacks.detection import detect, other_classes
from rt_detectron.evaluation.robustness.test_set import annotated_test_mapper
from rt_detectron.utils.errors import InputError

BALL = ThreatModel("linf", 4.0)
COUNTS = (7, 1, 2)


@pytest.fixture
def odd(photograph, annotated):
    """An input whose sides are no multiples of 32."""
    return annotated(photograph[:, :60, :70], 7)


def box_head(model, canvas, size, given):
    """Class scores and box deltas of the sampled proposals of an image in 0..255, with their true classes and
    the deltas that they should have: Detectron2's own steps, one after the other."""
    truth = given["instances"]
    model.train()
    with EventStorage(), torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(f"0/{given['image_id']}".encode()))
        images = ImageList(((canvas - model.pixel_mean) / model.pixel_std)[None], [size])
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features, [truth])
        heads = model.roi_heads
        (sampled,) = heads.label_and_sample_proposals(proposals, [truth])
        pooled = heads.box_pooler([features[f] for f in heads.box_in_features], [sampled.proposal_boxes])
        scores, deltas = heads.box_predictor(heads.box_head(pooled))
    model.eval()
    x0, y0, x1, y1 = sampled.proposal_boxes.tensor.T
    gx0, gy0, gx1, gy1 = sampled.gt_boxes.tensor.T
    width, height, gwidth, gheight = x1 - x0, y1 - y0, gx1 - gx0, gy1 - gy0
    wanted = torch.stack(
        [
            10 * ((gx0 + gwidth / 2) - (x0 + width / 2)) / width,
            10 * ((gy0 + gheight / 2) - (y0 + height / 2)) / height,
            5 * (gwidth / width).log(),
            5 * (gheight / height).log(),
        ],
        1,
    )
    return scores, deltas, sampled.gt_classes.tolist(), wanted


def published_loss(model, canvas, size, given, kind, limit):
    """Li et al.'s loss, proposal by proposal."""
    scores, deltas, classes, wanted = box_head(model, canvas, size, given)
    inverse = [1 / count for count in COUNTS]
    weights = [len(COUNTS) * value / sum(inverse) for value in inverse] + [1.0]
    total = 0
    for row, true in enumerate(classes):
        terms = []
        if kind in ("A_cls", "A_cwa"):
            loss = torch.logsumexp(scores[row], 0) - scores[row, true]
            terms.append(loss * (weights[true] if kind == "A_cwa" else 1))
        if kind in ("A_reg", "A_cwa") and true < len(COUNTS):
            terms.append((deltas[row, 4 * true : 4 * true + 4] - wanted[row]).abs().sum())
        for term in terms:
            total = total + (limit * term / term.detach() if term > limit else term)
    return total / len(classes)


def published_attack(model, given, kind, limit, steps=3):
    """Sign steps of 1 in a ball of 4, in 0..255, over the image and its padding."""
    image = given["image"].float()
    size = tuple(image.shape[1:])
    start = model.pixel_mean.expand(3, 64, 96).clone()
    start[:, : size[0], : size[1]] = image
    x = start.clone()
    for _ in range(steps):
        x.requires_grad_(True)
        (grad,) = torch.autograd.grad(published_loss(model, x, size, given, kind, limit), x)
        x = x.detach() + grad.sign()
        x = torch.min(torch.max(x, start - 4), start + 4).clamp(0, 255)
    return x


@pytest.mark.parametrize(("kind", "limit"), [("A_cls", 1.5), ("A_reg", 3.0), ("A_cwa", 1.0), ("A_cwa", 6.0)])
def test_oddefense(make_detector, odd, kind, limit):
    model = make_detector("fpn")
    expected = published_attack(model, odd, kind, limit)
    pgd = PGD(BALL, steps=3, relative_step_size=3 / 4)
    options = {"object_counts": COUNTS} if kind == "A_cwa" else {}
    attack = build_detector_attack(kind, pgd, clip=limit, padding=True, **options)
    (found,) = attack(model, [odd])
    assert found["image_size"] == (60, 70)
    assert found["image"].shape == expected.shape
    # The sign of a gradient that is zero but for rounding is anyone's.
    same = (found["image"] - expected).abs() < 1e-2
    assert same.float().mean() > 0.98
    assert same[:, 60:].float().mean() > 0.9
    assert (found["image"][:, 60:] - model.pixel_mean).abs().max() > 1  # the padding moved
    before, after = found["objective"]
    values = [
        float(published_loss(model, canvas, (60, 70), odd, kind, limit))
        for canvas in (published_attack(model, odd, kind, limit, steps=0), found["image"])
    ]
    assert (before, after) == pytest.approx(values, rel=1e-3)
    if limit > 1:  # at 1, nearly all proposals are clipped and have no gradient: rounding decides
        assert after >= before


def test_without_a_limit_they_are_detectron2s_own_losses(make_detector, picture):
    model = make_detector("cascade")
    for limit in (0.0, 1e6):
        found = [
            build_detector_attack(kind, PGD(BALL, steps=1), clip=limit).value(model, [picture])[0]
            for kind in ("A_cls", "A_reg")
        ]
        model.train()
        with EventStorage(), torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(b"0/7"))
            losses = model([picture])
        model.eval()
        expected = [
            sum(float(value) for name, value in losses.items() if name.startswith(kind))
            for kind in ("loss_cls", "loss_box_reg")
        ]
        assert found == pytest.approx(expected, rel=1e-4)


def test_no_proposals_cost_nothing(make_detector):
    model = make_detector("fpn")
    predictor = model.roi_heads.box_predictor
    proposals = Instances((60, 70))
    proposals.proposal_boxes, proposals.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0).long()
    predictions = predictor(torch.zeros(0, predictor.cls_score.in_features))
    expected = {name: float(loss) for name, loss in predictor.losses(predictions, [proposals]).items()}
    clip_proposal_losses(model, 6.0)
    found = {name: float(loss) for name, loss in predictor.losses(predictions, [proposals]).items()}
    del predictor.losses
    assert found == expected == {"loss_cls": 0, "loss_box_reg": 0}


def test_dag(make_detector, odd):
    model = make_detector("fpn")
    with torch.no_grad():  # so that some proposals are right
        model.roi_heads.box_predictor.cls_score.bias.copy_(torch.tensor([3.0, 0.0, 0.0, 0.0]))
    wrong = other_classes(3, 0).tolist()
    assert all(wrong[true] != true for true in range(3))
    canvas = model.pixel_mean.expand(3, 64, 96).clone()
    canvas[:, :60, :70] = odd["image"]
    scores, _, classes, _ = box_head(model, canvas, (60, 70), odd)
    gaps = [
        float(scores[row, wrong[true]] - scores[row, true])
        for row, true in enumerate(classes)
        if true < 3 and scores[row].argmax() == true
    ]
    assert gaps
    attack = build_detector_attack("DAG", PGD(BALL, steps=4, best=True))
    (value,) = attack.value(model, [odd])
    assert value == pytest.approx(sum(gaps) / len(classes), rel=1e-3)
    (found,) = attack(model, [odd])
    assert found["objective"][1] > found["objective"][0]


def test_mtd_takes_the_attack_that_raises_both_losses_more(make_detector, odd):
    model = make_detector("fpn")
    pgd = PGD(BALL, steps=2)
    (found,) = build_detector_attack("MTD", pgd)(model, [odd])
    both = []
    for kind in ("A_cls", "A_reg"):
        (attacked,) = build_detector_attack(kind, pgd)(model, [odd])
        losses = [build_detector_attack(k, pgd).value(model, [attacked])[0] for k in ("A_cls", "A_reg")]
        both.append((sum(losses), attacked["image"]))
    (value, image) = max(both, key=lambda pair: pair[0])
    assert torch.equal(found["image"], image)
    assert found["objective"][1] == pytest.approx(value, rel=1e-4)


def test_a_target_is_another_class(make_detector, odd):
    model = make_detector("fpn")
    attack = build_detector_attack("A_cls", PGD(BALL, steps=3), targeted=True)
    instances = odd["instances"]
    aimed = type(instances)(instances.image_size, **instances.get_fields())
    aimed.gt_classes = torch.tensor([other_classes(3, 0)[k] for k in instances.gt_classes])
    (found,) = attack(model, [odd])
    plain = replace(attack, targeted=False)
    towards = [plain.value(model, [{**each, "instances": aimed}])[0] for each in (odd, found)]
    assert found["objective"] == pytest.approx([-value for value in towards], rel=1e-4)
    assert towards[1] < towards[0]


def test_rare_classes_count_more_and_absent_ones_nothing():
    weights = inverse_frequency((1, 2, 4), 3)
    assert weights.tolist() == pytest.approx([12 / 7, 6 / 7, 3 / 7, 1])
    assert inverse_frequency((5, 0, 5), 3).tolist() == [1, 0, 1, 1]
    with pytest.raises(InputError, match="the objects of 2 classes; the detector has 3"):
        inverse_frequency((1, 2), 3)


@pytest.mark.parametrize(
    ("name", "expected"), [("A_cls", 1), ("A_reg", 10), ("A_box", 11), ("no_regression", 50.5)]
)
def test_the_losses_of_fcos(name, expected):
    losses = {"loss_fcos_cls": 1.0, "loss_fcos_loc": 10.0, "loss_fcos_ctr": 100.0}
    attack = build_detector_attack(name, PGD(BALL, steps=1))
    found = attack.objective({name: torch.tensor(value) for name, value in losses.items()})
    assert found == expected


def test_padding_changes_no_detection(learned):
    """Padded beforehand or by the detector, it is the same input, and boxes refer to the image."""
    cfg, model = learned
    given = annotated_test_mapper(cfg)(DatasetCatalog.get(cfg.DATASETS.TEST[0])[0])
    given["image"] = given["image"][:, :90, :85]
    padded = torch.full((3, 96, 96), 0.0) + model.pixel_mean
    padded[:, :90, :85] = given["image"]
    model.backbone.__class__.size_divisibility, before = 32, model.backbone.size_divisibility
    try:
        with torch.no_grad():
            (expected,) = model([given])
            (found,) = detect(model, [{**given, "image": padded, "image_size": (90, 85)}])
    finally:
        model.backbone.__class__.size_divisibility = before
    assert len(found["instances"]) == len(expected["instances"]) > 0
    boxes = [each["instances"].pred_boxes.tensor for each in (found, expected)]
    assert torch.allclose(*boxes, atol=1e-3)
    assert "preprocess_image" not in vars(model)


def test_they_do_more_harm_than_noise(learned):
    cfg, model = learned
    mapper = annotated_test_mapper(cfg)
    images = [mapper(image) for image in DatasetCatalog.get(cfg.DATASETS.TEST[0])[:3]]

    def right(inputs):
        """The number of objects that a sure detection of their class lies on."""
        count = 0
        with torch.no_grad():
            for each, output in zip(images, detect(model, inputs), strict=True):
                found = output["instances"][output["instances"].scores > 0.3]
                for box, true in zip(each["instances"].gt_boxes, each["instances"].gt_classes, strict=True):
                    near = (found.pred_boxes.tensor - box).abs().amax(1) < 8
                    count += bool((near & (found.pred_classes == true)).any())
        return count

    ball = ThreatModel("linf", 48)
    noisy = right(RandomNoise(ball)(model, images))
    assert noisy > 3
    for name in ("A_cls", "DAG", "MTD"):
        assert right(build_detector_attack(name, PGD(ball, steps=8))(model, images)) < noisy


class TestMistakes:
    @pytest.mark.parametrize(
        ("name", "options", "words"),
        [
            ("A_reg", {"targeted": True}, "'A_reg' has no target"),
            ("all", {"targeted": True}, "'all' has no target"),
            ("all", {"clip": 6.0}, "CLIP is 6; it takes a positive limit, and A_cls"),
            ("DAG", {"clip": 6.0}, "CLIP is 6"),
            ("A_cls", {"clip": -1.0}, "CLIP is -1"),
        ],
    )
    def test_options(self, name, options, words):
        with pytest.raises(InputError, match=words):
            build_detector_attack(name, PGD(BALL, steps=1), **options)

    @pytest.mark.parametrize(("name", "clip"), [("A_cls", 6.0), ("A_cwa", 0.0), ("DAG", 0.0), ("MTD", 6.0)])
    def test_a_detector_without_a_box_head(self, make_detector, picture, name, clip):
        attack = build_detector_attack(name, PGD(BALL, steps=1), clip=clip)
        with pytest.raises(InputError, match="the box head of an R-CNN, and RetinaNet has none"):
            attack(make_detector("retinanet"), [picture])
        with pytest.raises(InputError, match="the box head of an R-CNN, and RetinaNet has none"):
            attack.check(make_detector("retinanet"))  # before anything is measured
