import pytest

from rt_detectron.study.grid import load_study
from rt_detectron.study.schema import number, read_yaml
from rt_detectron.utils.errors import InputError


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
        read_yaml(tmp_path / "gone.yaml")


@pytest.mark.parametrize("value", [None, True, [1], "nan", "inf", -1, 0])
def test_no_positive_number(value):
    with pytest.raises(InputError, match="is not a positive number"):
        number(value, "here")


def test_numbers_may_be_written_in_ways_yaml_takes_for_text():
    assert [number(value, "here") for value in ("1e-2", 1, 0.5)] == [0.01, 1.0, 0.5]
    assert number(0, "here", zero=True) == 0.0
