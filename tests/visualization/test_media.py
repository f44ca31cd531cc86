"""Pictures and videos: what is found, where it goes, what is written, one bad file stops no other."""

import cv2
import numpy as np
import pytest
from PIL import Image

from rt_detectron.utils.errors import InputError
from rt_detectron.visualization.media import annotate_files, find_media, load_picture, output_paths

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(path, color=RED, size=(20, 10), **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **kwargs)
    return path


@pytest.fixture
def video(tmp_path):
    """Five frames of 48 x 32 pixels at 10 per second, from red to blue."""
    path = tmp_path / "in" / "film.avi"
    path.parent.mkdir()
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (48, 32))
    for step in range(5):
        frame = np.zeros((32, 48, 3), np.uint8)
        frame[:] = (255 * step // 4, 0, 255 - 255 * step // 4)  # BGR
        writer.write(frame)
    writer.release()
    return path


def frames(path):
    capture = cv2.VideoCapture(str(path))
    found = []
    while (read := capture.read())[0]:
        found.append(read[1][:, :, ::-1])
    return np.stack(found), capture.get(cv2.CAP_PROP_FPS)


class TestFind:
    def test_files_folders_and_patterns(self, tmp_path):
        b, a = picture(tmp_path / "b.JPG", format="JPEG"), picture(tmp_path / "a.png")
        picture(tmp_path / "below" / "c.png")
        (tmp_path / "notes.txt").write_text("no picture")
        (tmp_path / "film.mp4").touch()
        assert find_media([str(tmp_path)]) == ([a, b, tmp_path / "film.mp4"], [])
        assert find_media([str(tmp_path / "*.png")]) == ([a], [])
        assert find_media([str(tmp_path / "**" / "c.*")]) == ([tmp_path / "below" / "c.png"], [])
        # each once, in the order of the inputs; a file's ending is the user's to judge
        given = [str(b), str(tmp_path / "notes.txt"), str(tmp_path / "?.*")]
        assert find_media(given) == ([b, tmp_path / "notes.txt", a], [])

    def test_a_name_that_looks_like_a_pattern(self, tmp_path):
        path = picture(tmp_path / "a[1].png")
        assert find_media([str(path)]) == ([path], [])

    def test_relative_names_become_absolute(self, tmp_path, monkeypatch):
        path = picture(tmp_path / "a.png")
        monkeypatch.chdir(tmp_path)
        assert find_media(["a.png", ".", str(path)]) == ([path], [])

    def test_what_is_not_there_is_a_line_each(self, tmp_path):
        path = picture(tmp_path / "a.png")
        (tmp_path / "empty").mkdir()
        found, problems = find_media([str(tmp_path / name) for name in ("empty", "a.png", "b.png", "*.gif")])
        assert found == [path]
        assert [problem.removeprefix(f"{tmp_path}/").split(":")[0] for problem in problems] == [
            "empty",
            "b.png",
            "*.gif",
        ]
        assert "holds no picture or video (.bmp .gif" in problems[0]
        assert "no such file" in problems[1]


class TestOutputPaths:
    def test_names_are_kept_below_the_common_folder(self, tmp_path):
        sources = [tmp_path / name for name in ("day/1.jpg", "night/1.jpg", "night/1.PNG", "film.mp4")]
        assert [str(path) for path in output_paths(sources, "out")] == [
            "out/day/1.jpg",
            "out/night/1.jpg",
            "out/night/1.PNG",
            "out/film.mp4",
        ]
        assert [str(path) for path in output_paths(sources[1:3], "out")] == ["out/1.jpg", "out/1.PNG"]

    def test_other_formats_get_a_second_ending(self, tmp_path):
        sources = [tmp_path / name for name in ("1.jpg", "1.webp", "1.avi", "1.mov", "1")]
        assert [path.name for path in output_paths(sources, "out")] == [
            "1.jpg",
            "1.webp.jpg",
            "1.avi.mp4",
            "1.mov.mp4",
            "1.jpg",
        ]

    def test_inputs_are_never_overwritten(self, tmp_path, monkeypatch):
        source = picture(tmp_path / "a.png")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match=r"--output \. would overwrite .*a\.png"):
            output_paths([source], ".")

    def test_nothing_goes_nowhere(self):
        assert output_paths([], "out") == []


class TestAnnotate:
    @staticmethod
    def inverted(image):
        assert image.mode == "RGB"
        return Image.fromarray(255 - np.asarray(image))

    def test_pictures(self, tmp_path, capsys):
        sources = [picture(tmp_path / "in" / name) for name in ("a.png", "b.jpg", "c.bmp")]
        outputs = output_paths(sources, tmp_path / "out" / "deep")
        assert annotate_files(zip(sources, outputs, strict=True), self.inverted) == []
        for output in outputs:
            np.testing.assert_allclose(np.asarray(Image.open(output))[5, 5], (0, 255, 255), atol=3)
        assert [Image.open(output).format for output in outputs] == ["PNG", "JPEG", "JPEG"]
        assert capsys.readouterr().out.splitlines() == [str(output) for output in outputs]

    def test_a_video_keeps_frames_rate_and_colours(self, video, tmp_path, capsys):
        (output,) = output_paths([video], tmp_path / "out")
        assert annotate_files([(video, output)], self.inverted) == []
        before, rate_before = frames(video)
        after, rate_after = frames(output)
        assert after.shape == before.shape == (5, 32, 48, 3)
        assert rate_after == rate_before == 10
        np.testing.assert_allclose(after.mean((1, 2)), 255 - before.mean((1, 2)), atol=12)
        assert "film.avi: 100%" in capsys.readouterr().err
        assert [path.name for path in output.parent.iterdir()] == ["film.avi.mp4"]

    def test_frames_of_odd_size_lose_a_row(self, video, tmp_path):
        output = tmp_path / "odd.mp4"
        assert annotate_files([(video, output)], lambda image: image.resize((61, 41))) == []
        assert frames(output)[0].shape == (5, 40, 60, 3)

    def test_one_bad_file_stops_no_other(self, video, tmp_path):
        good = picture(tmp_path / "good.png")
        content = picture(tmp_path / "whole.jpg", size=(400, 400)).read_bytes()
        bad = {
            "empty.png": b"",
            "text.jpg": b"not a picture",
            "cut.jpg": content[: len(content) // 2],
            "empty.mp4": b"",
            "text.mp4": b"not a film",
            "cut.avi": video.read_bytes()[:300],
        }
        for name, data in bad.items():
            (tmp_path / name).write_bytes(data)
        sources = [*(tmp_path / name for name in bad), good]
        outputs = output_paths(sources, tmp_path / "out")
        problems = annotate_files(zip(sources, outputs, strict=True), self.inverted)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.png"]
        assert len(problems) == len(bad)
        for problem, name in zip(problems, bad, strict=True):
            assert problem.startswith(f"{tmp_path / name}: ")
            assert "\n" not in problem

    def test_a_failing_detector_is_no_bad_file_and_leaves_nothing(self, video, tmp_path):
        def fail(image):
            raise RuntimeError("out of memory")

        for source in (picture(tmp_path / "a.png"), video):
            with pytest.raises(RuntimeError, match="out of memory"):
                annotate_files([(source, tmp_path / "out" / "b.mp4")], fail)
        assert list((tmp_path / "out").iterdir()) == []

    def test_a_picture_that_the_detector_refuses_is_named(self, tmp_path):
        def refuse(image):
            raise InputError("too narrow")

        source = picture(tmp_path / "a.png")
        assert annotate_files([(source, tmp_path / "out" / "a.png")], refuse) == [f"{source}: too narrow"]

    def test_an_output_folder_that_cannot_be(self, tmp_path):
        source = picture(tmp_path / "a.png")
        (problem,) = annotate_files([(source, source / "out" / "a.png")], self.inverted)
        assert "cannot be made a folder" in problem


def test_a_picture_is_read_upright_and_in_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    Image.new("L", (8, 10), 7).save(tmp_path / "a.png", exif=exif)
    image = load_picture(tmp_path / "a.png")
    assert (image.size, image.mode, image.getpixel((0, 0))) == ((10, 8), "RGB", (7, 7, 7))
