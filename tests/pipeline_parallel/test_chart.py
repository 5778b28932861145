"""Pictures of schedules: what is drawn, that it is readable, and the files."""

import xml.etree.ElementTree as ElementTree

import pytest

from pypar.pipeline_parallel import schedules, simulate
from pypar.pipeline_parallel.picture.chart import DIGIT, FONT, ROW, charts, draw
from pypar.pipeline_parallel.stage_cost import StageCost
from tests.pipeline_parallel.stage import BIDIRECTIONAL


def _actions(drawing):
    return [box for box in drawing.boxes if box.label and not box.beside]


@pytest.mark.parametrize("name", ["one_f_one_b", "zb_v", "dualpipe", "seq1f1b"])
def test_eight_ranks_with_32_microbatches_are_readable(name):
    """Each number has room in its box, and no box lies over another."""
    schedule = schedules.build(name, 8, 32)
    drawing = charts({name: simulate(schedule, StageCost(10, 11, 9, pair=22))})
    boxes = _actions(drawing)
    assert len(boxes) == sum(map(len, schedule.lists)) and drawing.width < 6000
    narrow = [box for box in boxes if box.width < DIGIT * len(box.label)]
    assert len(narrow) <= 0.02 * len(boxes)
    assert all(box.height >= FONT and box.height <= ROW for box in boxes)
    for row in {round(box.top / ROW) for box in boxes}:
        in_row = sorted(
            (box for box in boxes if round(box.top / ROW) == row), key=lambda box: (box.left, box.top)
        )
        for this, behind in zip(in_row, in_row[1:], strict=False):
            beneath = behind.top >= this.top + this.height or this.top >= behind.top + behind.height
            assert beneath or behind.left >= this.left + this.width - 1e-6


def test_boxes_lie_where_the_simulation_says():
    result = simulate(BIDIRECTIONAL, [StageCost(1, 1, 1), StageCost(3, 1, 1)])
    drawing = charts({"one": result, "two": result})
    assert [words.split(":")[0] for _, _, words in drawing.titles if ":" in words] == ["one", "two"]
    boxes = _actions(drawing)
    longest = max(row[-1] for row in result.end)
    scale = max(box.width for box in drawing.boxes) / longest
    first = [(box.label, (box.left - boxes[0].left) / scale, box.width / scale) for box in boxes[:4]]
    expected = [
        (str(action.microbatch), begin, end - begin)
        for action, begin, end in zip(BIDIRECTIONAL.lists[0], result.start[0], result.end[0], strict=True)
    ]
    for drawn, told in zip(first, expected, strict=True):
        assert drawn == (told[0], pytest.approx(told[1]), pytest.approx(told[2]))
    assert {box.border for box in boxes} == {0.3, 1.0}  # the second path is bold
    colors = {box.color for box in boxes}
    assert len(colors) == 4  # F and B of two stages


def test_files(tmp_path):
    results = {name: simulate(schedules.build(name, 2, 3)) for name in ("gpipe", "pipedream")}
    for suffix in ("svg", "png"):
        draw(results, tmp_path / f"a.{suffix}")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert "rank 1" in words and "2" in words and "update" in words
    draw(results, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"ends in .svg or .png, not to .*a.jpg"):
        draw(results, tmp_path / "a.jpg")
