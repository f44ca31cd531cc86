import pytest
import torch

from rt_detectron.attacks import ThreatModel
from rt_detectron.utils.errors import InputError

SHAPE = (5, 3, 8, 8)


def norms(threat_model, perturbation):
    order = {"l1": 1, "l2": 2, "linf": float("inf")}[threat_model.norm]
    return torch.linalg.vector_norm(perturbation.flatten(1), ord=order, dim=1)


@pytest.fixture(params=[("l1", 4.0), ("l2", 0.5), ("linf", 8.0)], ids=lambda p: p[0])
def threat_model(request):
    return ThreatModel(*request.param)


def test_linf_eps_is_in_255ths_and_l2_eps_is_not():
    assert ThreatModel("linf", 4).radius == pytest.approx(4 / 255)
    assert ThreatModel("l2", 3.0).radius == 3.0


def test_project_shrinks_what_is_outside_and_keeps_what_is_inside(threat_model):
    direction = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    unit = direction / norms(threat_model, direction).view(-1, 1, 1, 1)
    outside, inside = unit * threat_model.radius * 3, unit * threat_model.radius * 0.5
    projected = threat_model.project(outside)
    assert torch.allclose(norms(threat_model, projected), torch.tensor(threat_model.radius))
    assert torch.allclose(threat_model.project(inside), inside)
    if threat_model.norm == "l2":  # the nearest point of a round ball lies in the same direction
        assert torch.allclose(projected, unit * threat_model.radius, atol=1e-6)


def test_random_start_fills_the_ball_and_stays_in_it(threat_model):
    torch.manual_seed(0)
    start = threat_model.random_start(torch.zeros(200, 1, 1, 2))
    relative = norms(threat_model, start) / threat_model.radius
    assert relative.max() <= 1 + 1e-6
    # In two dimensions each ball holds a quarter of their area within half the radius.
    assert 0.15 < (relative < 0.5).float().mean() < 0.35


def test_step_has_the_asked_size_and_no_direction_is_better(threat_model):
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(SHAPE, generator=generator)
    step = threat_model.step(grad, 0.25)
    assert torch.allclose(norms(threat_model, step), torch.tensor(0.25))
    if threat_model.norm == "l1":  # best would be a single pixel; the largest of them share the step
        assert (step != 0).flatten(1).sum(1).tolist() == [3 * 8 * 8 // 100] * 5
    others = torch.randn(SHAPE, generator=generator)
    others = others * (0.25 / norms(threat_model, others)).view(-1, 1, 1, 1)
    assert ((step * grad).flatten(1).sum(1) >= (others * grad).flatten(1).sum(1)).all()


def test_a_zero_gradient_gives_no_step_and_no_nan(threat_model):
    assert torch.equal(threat_model.step(torch.zeros(SHAPE), 0.25), torch.zeros(SHAPE))
    assert torch.equal(threat_model.project(torch.zeros(SHAPE)), torch.zeros(SHAPE))


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30])
def test_the_size_of_a_gradient_does_not_matter(threat_model, scale):
    grad = torch.randint(1, 9, SHAPE, generator=torch.Generator().manual_seed(0)).float()
    step = threat_model.step(grad * scale, 4.5)
    assert torch.allclose(norms(threat_model, step), torch.tensor(4.5))
    if scale != 1e-44:  # there floats have few digits
        assert torch.allclose(step, threat_model.step(grad, 4.5), rtol=1e-4)


def test_an_overflowed_gradient_gives_a_step_of_the_asked_size(threat_model):
    grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    grad[0, 0, 0, :2] = torch.tensor([float("inf"), float("-inf")])
    grad[1] = float("nan")
    step = threat_model.step(grad, 0.25)
    assert torch.allclose(norms(threat_model, step)[[0, 2, 3, 4]], torch.tensor(0.25))
    assert step[0, 0, 0, 0] >= 0 >= step[0, 0, 0, 1]
    assert step[0, 0, 0, 0] - step[0, 0, 0, 1] > 0.1
    assert step[1].abs().max() == 0


@pytest.mark.parametrize(
    ("norm", "eps", "words"),
    [
        ("l0", 1.0, "use 'l1', 'l2' or 'linf'"),
        ("l2", -1.0, "finite number >= 0"),
        ("l2", float("nan"), "finite number >= 0"),
        ("l2", "3", "finite number >= 0"),
        ("l2", True, "finite number >= 0"),
        ("linf", 8 / 255, "did you mean eps=8"),
        ("linf", 1000.0, "units of 1/255; 1000.0 is more than all of 255"),
    ],
)
def test_bad_input_is_one_line(norm, eps, words):
    with pytest.raises(InputError, match=words) as error:
        ThreatModel(norm, eps)
    assert "\n" not in str(error.value)


def test_l1_projection_is_the_nearest_point_of_the_ball():
    """By the optimality condition: (x - p) . (q - p) <= 0 for every q in the ball."""
    generator = torch.Generator().manual_seed(0)
    threat_model = ThreatModel("l1", 2.0)
    x = torch.randn(SHAPE, generator=generator)
    projected = threat_model.project(x)
    for _ in range(50):
        other = torch.randn(SHAPE, generator=generator).pow(3)  # some of them all but sparse
        other *= 2.0 / norms(threat_model, other).view(-1, 1, 1, 1)
        assert (((x - projected) * (other - projected)).flatten(1).sum(1) <= 1e-4).all()
    corners = torch.zeros(5, x[0].numel())
    corners[torch.arange(5), x.flatten(1).abs().argmax(1)] = 2.0
    corners = corners.view(SHAPE) * x.sign()
    assert (((x - projected) * (corners - projected)).flatten(1).sum(1) <= 1e-4).all()


@pytest.mark.parametrize("eps", [0.1, 3.0, 20.0, 1000.0])
def test_the_nearest_image_is_found_in_the_ball_and_in_0_1(eps):
    """Against the definition by its optimality condition: soft thresholding, capped at the border of [0, 1],
    whose threshold is found by bisection in double precision."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(SHAPE, generator=generator)
    images[:2] = images[:2].round()  # at the border, where clamping matters most
    scales = torch.tensor([0.01, 0.3, 1.0, 3.0, 1e-3]).view(-1, 1, 1, 1)
    points = images + torch.randn(SHAPE, generator=generator) * scales
    found = ThreatModel("l1", eps).nearest(points, images)

    perturbation = points.double() - images.double()
    room = torch.where(perturbation > 0, 1 - images.double(), images.double())
    low, high = torch.zeros(5, 1, 1, 1).double(), perturbation.abs().amax((1, 2, 3), keepdim=True)
    for _ in range(60):
        threshold = (low + high) / 2
        magnitude = (perturbation.abs() - threshold).clamp_min(0).minimum(room)
        is_inside = magnitude.sum((1, 2, 3), keepdim=True) <= eps
        low, high = torch.where(is_inside, low, threshold), torch.where(is_inside, threshold, high)
    expected = images.double() + perturbation.sign() * magnitude
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5)
    assert (norms(ThreatModel("l1", eps), found - images) <= eps * (1 + 1e-5)).all()


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("linf", 8.0)])
def test_elsewhere_it_is_projected_and_clamped(norm, eps):
    generator = torch.Generator().manual_seed(0)
    images, threat_model = torch.rand(SHAPE, generator=generator), ThreatModel(norm, eps)
    points = images + torch.randn(SHAPE, generator=generator)
    expected = (images + threat_model.project(points - images)).clamp(0, 1)
    torch.testing.assert_close(threat_model.nearest(points, images), expected)


def test_scale_shrinks_the_ball_for_a_schedule():
    assert ThreatModel("linf", 4, scale=0.01).radius == pytest.approx(0.04 / 255)
    assert torch.equal(ThreatModel("l1", 4, scale=0.0).project(torch.ones(SHAPE)), torch.zeros(SHAPE))
