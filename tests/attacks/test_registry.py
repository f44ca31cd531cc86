import runpy
import sys

import pytest

from rt_detectron import attacks
from rt_detectron.attacks import PGD, AutoAttack, ThreatModel, attack_named, register_attack
from rt_detectron.attacks.registry import _ATTACKS
from rt_detectron.utils.errors import InputError

LINF = ThreatModel("linf", 1.0)


def test_attacks_have_names():
    assert attack_named("pgd20", LINF) == PGD(LINF, 20)
    assert attack_named("pgd100x5", LINF) == PGD(LINF, 100, random_start=True, restarts=5)
    for name in ("pgd", "pgdx", "fgsm", "", "pgd20x"):
        with pytest.raises(InputError, match=r"is unknown; use e.g. autoattack, pgd20"):
            attack_named(name, LINF)
    with pytest.raises(InputError, match="steps is 0"):
        attack_named("pgd0", LINF)


def test_autoattack_has_its_name_and_seed():
    pytest.importorskip("pyautoattack", reason='the extra "autoattack" is not installed')
    assert attack_named("autoattack", LINF, seed=3) == AutoAttack(LINF, 3)


def test_an_attack_joins_by_its_decorator(monkeypatch):
    monkeypatch.setattr("rt_detectron.attacks.registry._ATTACKS", dict(_ATTACKS))

    @register_attack(r"noise(\d+)?", "noise3")
    def noise(threat_model, seed, times):
        return threat_model, seed, times

    assert noise(1, 2, 3) == (1, 2, 3)
    assert attack_named("noise", LINF, 7) == (LINF, 7, None)
    assert attack_named("noise12", LINF) == (LINF, 0, "12")
    with pytest.raises(InputError, match=r"'noises' is unknown; use e.g. .*, noise3"):
        attack_named("noises", LINF)


def test_a_new_file_among_the_attacks_is_all_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr("rt_detectron.attacks.registry._ATTACKS", dict(_ATTACKS))
    (tmp_path / "sticker.py").write_text(
        "from rt_detectron.attacks.registry import register_attack\n\n"
        '@register_attack("sticker", "sticker")\n'
        "def sticker(threat_model, seed):\n    return threat_model\n"
    )
    monkeypatch.setattr(attacks, "__path__", [*attacks.__path__, str(tmp_path)])
    runpy.run_path(attacks.__file__, {"__path__": attacks.__path__}, attacks.__name__)
    sys.modules.pop("rt_detectron.attacks.sticker")
    assert attack_named("sticker", LINF) is LINF
