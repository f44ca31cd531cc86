import numpy as np
import pandas as pd

from rt_detectron.study.answers import answers, cautions
from rt_detectron.study.report import terminal_table
from rt_detectron.study.selection import Choice
from rt_detectron.study.statistics import Comparison, Quantity, verdicts

BOX = Quantity("clean", "bbox")


def row(arm, low, high, target="mask", n=3):
    """The clean AP of an arm, with the interval of its difference to the arm "standard"."""
    change = [(low + high) / 2, n, 1.0, low, high, "seeds"] if arm != "standard" else [np.nan] * 5 + [""]
    names = ["change", "change_n", "change_sd", "low", "high", "over"]
    line = {"target": target, "arm": arm, "baseline": "standard", "learning_rate": 0.02, "seeds": range(n)}
    return line | BOX._asdict() | {"n": n, "mean": 30.0, "sd": 1.0} | dict(zip(names, change, strict=True))


def scores(*rows):
    frame = pd.DataFrame(rows)
    return frame.assign(verdict=verdicts(frame))


def told(rows, choices):
    """The cautions on these scores."""
    return cautions(Comparison(None, [], None, scores(*rows), []), choices)


def test_one_comparison_is_told_in_a_sentence():
    (answer,) = answers(scores(row("standard", 0, 0), row("robust", 0.5, 1.5)))
    assert answer.verdict == "better"
    assert answer.summary == "robust is better than standard: box AP +1.00 [+0.50, +1.50]."
    (answer,) = answers(scores(row("standard", 0, 0), row("robust", -0.5, 1.5)))
    assert answer.summary.startswith("Whether robust differs from standard is undecided: box AP +0.50 [")


def test_several_comparisons_are_counted_and_listed():
    rows = [row("standard", 0, 0), row("a", 1, 2), row("b", 1, 3), row("c", -1, 1)]
    (answer,) = answers(scores(*rows))
    assert (answer.verdict, answer.summary) == ("mixed", "Box AP: 2 of 3 comparisons better, 1 undecided.")
    assert [name.split()[0] for name in answer.listed["better"]] == ["a", "b"]
    (answer,) = answers(scores(*rows[:3]))
    assert (answer.verdict, answer.summary) == ("better", "Box AP: 2 of 2 comparisons better.")


def test_targets_are_named_where_there_are_several():
    (answer,) = answers(scores(row("a", 1, 2), row("a", 1, 2, target="retina")))
    assert [" ".join(name.split()[:2]) for name in answer.listed["better"]] == ["a (mask)", "a (retina)"]


def test_cautions_say_what_the_intervals_leave_out():
    one = " ".join(told([row("a", 1, 2)], []))
    assert "not the choice of test images" in one
    assert "With 3 seeds they are wide" in one
    assert "not corrected" not in one  # a single interval
    many = " ".join(told([row(f"a{i}", 1, 2, n=6) for i in range(10)], []))
    assert "wide" not in many
    assert "10 intervals. Each misses the true difference in 5 %" in many
    assert "about 0.5 of them would exclude 0 by chance" in many


def test_cautions_name_learning_rates_at_the_border():
    choices = [Choice(arm, "mask", 0.1, {0.1: 3.0}, arm == "a") for arm in ("a", "b")]
    assert told([row("a", 1, 2)], choices)[-1] == (
        "The best learning rate is at the border of the grid for a (mask): a better one may lie outside."
    )


def test_terminal_table_has_a_line_per_arm_with_interval_and_verdict():
    lines = terminal_table(scores(row("standard", 0, 0), row("robust", -2, -1))).splitlines()
    assert len(lines) == 4
    minus = "\N{MINUS SIGN}"
    assert lines[3].split() == (
        f"box AP mask robust 0.02 3 30.00 ± 1.00 {minus}1.50 [{minus}2.00, {minus}1.00] worse".split()
    )
