"""The pictures say what the data say, can be read on light and on dark, and call predictions so."""

import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import selection
from made_up_results import kernel_row, model_row, results_of

from benchmarks.measured import Chip
from benchmarks.pictures import __main__ as pictures
from benchmarks.report.__main__ import read_chips
from benchmarks.table5 import ENTRIES, distinct

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "docs" / "pictures").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
BY_NAME = {e.network: e for e in ENTRIES}
SMALL = BY_NAME["DeiT-S distilled"]
FUSED = {"op": "linear", "network": "B", "case": "fc2", "dtype": "bf16"}
CPU = {"batch": 8, "asked_batch": 8}


@pytest.fixture
def drawing():
    selection.extra("bench", "matplotlib")


def rows(modes):
    """Rows of every network, and latencies of one."""
    for entry in distinct(list(ENTRIES)):
        for mode, factor in modes.items():
            if "deit_fast" not in mode or entry.family == "transformer":
                yield model_row(entry, mode, factor * entry.v100_images_per_s, **CPU)
    for mode, factor in modes.items():
        for batch in (1, 2, 4):
            yield model_row(
                SMALL, mode, 100.0 * factor, protocol="latency", asked_batch=batch, batch=batch
            )


def chip_of(folder, gpu):
    modes = {"eager_fp32": 2.0, "deit_fast_fp32": 3.0}
    if gpu:
        modes = {"eager_fp32": 1.0, "eager_bf16": 2.0, "deit_fast_engine_bf16": 3.0}
    found = [*rows(modes)]
    if gpu:
        found += [kernel_row(**FUSED, ms=2.0), kernel_row(**FUSED | {"case": "qkv"}, mode="eager")]
    results_of(*found, gpu=gpu).save(folder / ("gpu" if gpu else "cpu-made-up") / "table5.json")
    return read_chips(folder)


def size_of(style):
    return float(re.search(r"font-size: ([\d.]+)px", style or "")[1])


def leaving(root):
    """Texts whose ends, at a letter's usual width, lie outside the viewBox."""
    *_, width, height = map(float, root.get("viewBox").split())
    for text in root.iter(f"{SVG}text"):
        style, shift = text.get("style"), text.get("transform", "")
        if "rotate(-90" in shift:
            continue
        size, words = size_of(style), "".join(text.itertext())
        found = re.search(r"translate\(([-\d.]+) ([-\d.]+)\)", shift)
        x, y = (float(found[1]), float(found[2])) if found else (0.0, 0.0)
        x, y = x + float(text.get("x") or 0), y + float(text.get("y") or 0)
        share = {"middle": 0.5, "end": 1.0}.get(text.get("text-anchor"), 0.0)
        if "text-anchor" in style:
            share = {"middle": 0.5, "end": 1.0, "start": 0.0}[
                re.search(r"text-anchor: (\w+)", style)[1]
            ]
        long = 0.53 * size * len(words)
        left = x - share * long
        if left < 0 or left + long > width or not 0 < y < height:
            yield words


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_picture_reads_on_light_and_on_dark(path):
    content = path.read_text()
    root = ElementTree.fromstring(content)
    style = "".join(element.text or "" for element in root.iter(f"{SVG}style"))
    assert "@media (prefers-color-scheme:dark)" in style
    defined = set(re.findall(r"--([a-z]+):", style))
    used = set(re.findall(r"var\(--([a-z]+)\)", content))
    assert used <= defined and "ink" in used
    # nothing has a colour of one scheme alone, and nothing is behind the picture
    body = content[content.index("</style>") :]
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", body)
    assert len(root.findtext(f"{SVG}title")) > 10 and len(root.findtext(f"{SVG}desc")) > 40
    assert root.get("role") == "img"
    assert list(leaving(root)) == []
    assert not re.search(r"20\d\d-\d\d-\d\d", content)  # no date


def test_every_picture_is_on_the_page_of_figures():
    page = (ROOT / "docs" / "results" / "pictures.md").read_text()
    shown = set(re.findall(r"!\[.+?\]\(\.\./pictures/(.+?)\)", page))
    assert shown == {path.name for path in (ROOT / "docs" / "pictures").iterdir()}


@pytest.mark.parametrize("name", ("throughput", "latency", "roofline"))
def test_predictions_are_called_predicted(name):
    """In the same text: a label of a predicted point, its heading, or what is below the title."""
    root = ElementTree.parse(ROOT / "docs" / "pictures" / f"{name}.svg").getroot()
    labels = [t for e in root.iter(f"{SVG}text") if "H100" in (t := "".join(e.itertext()))]
    measured = [
        path for path in (ROOT / "benchmarks" / "results").glob("*/") if "cpu" not in path.name
    ]
    if not measured:
        text = " ".join("".join(e.itertext()) for e in root.iter(f"{SVG}text"))
        assert labels and text.count("predicted") >= 4
        assert "predicted" in root.findtext(f"{SVG}desc")


def test_same_is_bytes_of_one_matplotlib_and_texts_of_two():
    content = SHIPPED[0].read_bytes()
    moved = content.replace(b'viewBox="0 0', b'viewBox="1 1', 1)
    assert moved != content and pictures.same(content, content)
    assert not pictures.same(moved, content)
    other = re.sub(rb"matplotlib [\d.]+", b"matplotlib 3.9.9", moved, count=1)
    assert pictures.same(other, content)
    assert not pictures.same(other.replace(b"</desc>", b" and more</desc>"), content)
    assert not pictures.same(b"<!-- cut -->\n<svg", content)


@pytest.mark.slow
def test_a_wrong_name_and_a_damaged_file_are_errors(tmp_path, capsys, drawing):
    assert pictures.main(["--only", "nothing", "--out", str(tmp_path)]) == 2
    assert "--only: 'nothing', expected one of throughput" in capsys.readouterr().err
    (tmp_path / "chip").mkdir()
    (tmp_path / "chip" / "table5.json").write_text("{")
    assert pictures.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "table5.json: not JSON" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_check_finds_a_stale_and_a_missing_picture(tmp_path, capsys, drawing):
    studies = shutil.copytree(ROOT / "docs" / "studies", tmp_path / "studies")
    args = ["--only", "training", "--out", str(tmp_path), "--studies", str(studies)]
    assert pictures.main([*args, "--check"]) == 1 and "is missing" in capsys.readouterr().out
    assert pictures.main(args) == 0 and pictures.main([*args, "--check"]) == 0
    first = (tmp_path / "training.svg").read_bytes()
    assert pictures.main(args) == 0 and (tmp_path / "training.svg").read_bytes() == first
    capsys.readouterr()
    curves = studies / "curves.json"
    curves.write_text(curves.read_text().replace("84.78", "94.78"))  # someone improves a figure
    assert pictures.main([*args, "--check"]) == 1
    assert "training.svg is not what the data say" in capsys.readouterr().out
    assert (tmp_path / "training.svg").read_bytes() == first


@pytest.mark.slow
def test_the_shipped_pictures_are_what_the_data_say(capsys, drawing):
    assert pictures.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ("NVIDIA Made-up", None), ids=("gpu", "cpu"))
@pytest.mark.parametrize("name", ("throughput", "latency", "roofline"))
def test_measured_points_and_no_text_over_another(name, gpu, tmp_path, drawing):
    from benchmarks.pictures import labels, style

    draw = pictures._pictures(chip_of(tmp_path, gpu), ROOT / "docs" / "studies")[name]
    with style.drawing():
        picture = draw()
        assert labels.collisions(picture.figure) == []
        root = ElementTree.fromstring(style.svg(picture))
    text = " ".join("".join(e.itertext()) for e in root.iter(f"{SVG}text"))
    if gpu:  # measured figures take the place of predicted ones
        assert "predicted" not in text + picture.description
        assert "NVIDIA Made-up" in text and "measured" in text
    else:
        assert "predicted" in text
        assert ("(CPU, 2 threads)" in text) == (name != "roofline")
    assert list(leaving(root)) == []
    if name == "throughput":
        speed = {"NVIDIA Made-up": 3 * 936.2, None: 2 * 936.2}[gpu]
        assert f"S {speed:,.4g} images/s 81.2%" in picture.description
    if name == "latency" and not gpu:
        of_cpu = picture.description.split("measured: ")[1]
        assert "deit_fast fp32: DeiT-S: batch 1 3.33 ms, batch 2 6.67 ms, batch 4 13.3 ms" in of_cpu
        assert "batch 8" not in of_cpu  # of another protocol
    if name == "roofline" and gpu:
        assert "fc2 1000 FLOP per byte 500 TFLOP/s" in picture.description


@pytest.mark.slow
def test_one_batch_size_makes_no_line(tmp_path, drawing):
    from benchmarks.pictures import latency, style

    results_of(model_row(SMALL, "eager_fp32", 2.0, **CPU), gpu=None).save(tmp_path / "table5.json")
    with style.drawing():
        assert "measured" not in latency.draw([Chip.read(tmp_path)]).description


@pytest.mark.slow
def test_shipped_pictures_have_no_text_over_another(drawing):
    from benchmarks.pictures import labels, style

    for name, draw in pictures._pictures([], ROOT / "docs" / "studies").items():
        with style.drawing():
            assert labels.collisions(draw().figure) == [], name


@pytest.mark.slow
def test_a_text_over_another_and_one_that_leaves_are_found(drawing):
    from benchmarks.pictures import labels, style

    with style.drawing():
        figure = style.frame(3.0, "One", "Below")
        figure.text(0.5, 0.5, "first")
        figure.text(0.5, 0.5, "second")
        figure.text(0.95, 0.2, "a long text at the right")
    found = labels.collisions(figure)
    assert found == ["'a long text at the right' leaves the figure", "'first' overlaps 'second'"]


@pytest.mark.slow
def test_colours_differ_from_their_background_enough_to_be_read(drawing):
    """WCAG's contrast: 4.5 for texts, on white and on GitHub's and mkdocs-material's dark."""
    from benchmarks.pictures.style import COLOURS

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for name, (light, dark) in COLOURS.items():
        if name != "grid":
            assert contrast(light, "#ffffff") >= 4.5, name
            assert contrast(dark, "#0d1117") >= 4.5 and contrast(dark, "#1e2129") >= 4.5, name
    assert len({light for light, _ in COLOURS.values()}) == len(COLOURS)


@pytest.mark.slow
def test_screenshots_of_the_report(tmp_path, drawing):
    selection.tool("chromium", "google-chrome")
    assert pictures.main(["--report", "--results", str(tmp_path), "--out", str(tmp_path)]) == 0
    from PIL import Image

    light, dark = (
        Image.open(tmp_path / f"report_{s}.webp").convert("L") for s in ("light", "dark")
    )
    assert light.getpixel((3, 3)) > 240 > 40 > dark.getpixel((3, 3))


@pytest.mark.slow
def test_the_example_says_that_it_is_one(drawing):
    from benchmarks.pictures.example import chip
    from benchmarks.report import page

    text = page.render(chip(), {})
    assert "<h1>DeiT, Table 5 on example data, not measured</h1>" in text
