from rt_detectron.study.answers import answers, cautions
from rt_detectron.study.measurements import Quantity
from rt_detectron.study.selection import Choice
from rt_detectron.study.statistics import Change, Interval, Row, Summary
from rt_detectron.study.tables import terminal_table

BOX = Quantity("clean", "bbox")


def row(arm, low, high, target="mask", n=3):
    score = {BOX: Summary(n, 30.0, 1.0)}
    change = {BOX: Change(Summary(n, (low + high) / 2, 1.0), Interval(low, high, "seeds"))}
    return Row(arm, target, "standard", 0.02, tuple(range(n)), score, change if arm != "standard" else {})


def test_one_comparison_is_told_in_a_sentence():
    (answer,) = answers([row("standard", 0, 0), row("robust", 0.5, 1.5)])
    assert answer.verdict == "better"
    assert answer.summary == "robust is better than standard: box AP +1.00 [+0.50, +1.50]."
    (answer,) = answers([row("standard", 0, 0), row("robust", -0.5, 1.5)])
    assert answer.summary.startswith("Whether robust differs from standard is undecided: box AP +0.50 [")


def test_several_comparisons_are_counted_and_listed():
    rows = [row("standard", 0, 0), row("a", 1, 2), row("b", 1, 3), row("c", -1, 1)]
    (answer,) = answers(rows)
    assert (answer.verdict, answer.summary) == ("mixed", "Box AP: 2 of 3 comparisons better, 1 undecided.")
    assert [name.split()[0] for name in answer.listed["better"]] == ["a", "b"]
    (answer,) = answers(rows[:3])
    assert (answer.verdict, answer.summary) == ("better", "Box AP: 2 of 2 comparisons better.")


def test_targets_are_named_where_there_are_several():
    (answer,) = answers([row("a", 1, 2), row("a", 1, 2, target="retina")])
    assert [" ".join(name.split()[:2]) for name in answer.listed["better"]] == ["a (mask)", "a (retina)"]


def test_cautions_say_what_the_intervals_leave_out():
    one = " ".join(cautions([row("a", 1, 2)], []))
    assert "not the choice of test images" in one
    assert "From 3 seeds they are wide" in one
    assert "not corrected" not in one  # a single interval
    many = " ".join(cautions([row(f"a{i}", 1, 2, n=6) for i in range(10)], []))
    assert "wide" not in many
    assert "10 intervals, each wrong in 5 %" in many
    assert "about 0.5 would leave out 0 by chance" in many


def test_cautions_name_learning_rates_at_the_border():
    choices = [Choice(arm, "mask", 0.1, {0.1: 3.0}, arm == "a") for arm in ("a", "b")]
    assert cautions([row("a", 1, 2)], choices)[-1].endswith("lie outside, for a (mask).")


def test_terminal_table_has_a_line_per_arm_with_interval_and_verdict():
    lines = terminal_table([row("standard", 0, 0), row("robust", -2, -1)]).splitlines()
    assert len(lines) == 4
    minus = "\N{MINUS SIGN}"
    assert lines[3].split() == (
        f"box AP mask robust 0.02 3 30.00 ± 1.00 {minus}1.50 [{minus}2.00, {minus}1.00] worse".split()
    )
