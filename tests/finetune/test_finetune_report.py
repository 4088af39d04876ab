"""The report: complete, whole, readable by programs, and safe whatever the names are."""

import base64
import csv
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import timm
import torch
from evaluations import Noise, drawn, evaluation
from PIL import Image
from saved_models import tiny

from deit_fast.calibration import Calibration, Unknown
from deit_fast.finetune import charts, report, thumbnails
from deit_fast.finetune.calibration import fit

NASTY = ["<script>alert(1)</script>", "Größe & \"x\" 'y'", "شجرة", "a" * 200, "${title}$$"]
PICTURE = 'b<b>&"שלום\udcff{}' + "long" * 40 + ".png"
VOID = {"meta", "img", "br", "path", "rect", "circle"}


class Page(HTMLParser):
    """Checks that tags are closed, and collects them and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag != "header" or self.open[-1:] == [tag]:
            assert self.open.pop() == tag, f"{tag} closed, {self.open} open"

    def handle_data(self, data):
        self.text += data


def write(folder, classes=5, images=60, model=None, calibrated=True, **options):
    names = (NASTY + [f"class {i}" for i in range(classes)])[:classes]
    shown = Noise(np.arange(images) % classes, names, name=PICTURE)
    found = drawn(images, classes)
    found.labels, found.classes = found.labels.astype(np.int64), names
    found.names = [shown.name(i) for i in range(images)]
    found.skipped = [("bad<i>.png", "no <image>")]
    how = fit(found) if calibrated else None
    model = model or tiny(num_classes=classes)
    facts = {"Data <x>": {"a<b": "<img src=x>", "n": 3}, "Recipe": {str(i): i for i in range(20)}}
    log = [{"epoch": i, "loss": 3 / i, "lr": 1e-4 / i, "top1/class": 10.0 * i} for i in (1, 2, 3)]
    content = report.write_report(
        folder, facts, found, model, shown, title="<T> & ${x}", about="<about>",
        calibration=how, origin="<origin>", log=log, **options,
    )  # fmt: skip
    return found, how, content, (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def few_cases():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "CASES", 3)
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "report"
    return folder, *write(folder)


def test_the_page_needs_nothing_and_escapes_names(written):
    _, found, _, _, text = written
    page = Page(text.replace('<html lang="en">', "").replace("</html>", ""))
    assert "script" not in page.tags and "link" not in page.tags and "b<b>" not in text
    sources = [value for tag, name, value in page.attributes if name in ("src", "href")]
    assert sources and all(value.startswith("data:image/") for value in sources)
    for name in (*NASTY, "<T> & ${x}", "<about>", "<origin>", "<img src=x>", "no <image>"):
        assert name in page.text, name
    assert "\\udcff" in page.text and "prefers-color-scheme: dark" in text
    assert "class token" in page.text and "distillation token" in page.text
    assert "url(" not in text and "@import" not in text


def test_files_for_programs(written):
    folder, found, how, content, _ = written
    assert sorted(path.name for path in folder.iterdir()) == [
        "confusion.csv", "per_class.csv", "predictions.csv", "report.html", "report.json",
    ]  # fmt: skip
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(content))
    rows = list(csv.DictReader(io.StringIO((folder / "predictions.csv").read_text())))
    assert len(rows) == 60 and [r["label"] for r in rows] == [NASTY[i] for i in found.labels]
    assert [int(r["correct"]) for r in rows] == found.correct.astype(int).tolist()
    best = found.probabilities(how.temperature).max(1)
    assert [float(r["probability"]) for r in rows] == [pytest.approx(round(p, 6)) for p in best]
    unknown = found.scores("max_logit") < how.unknown.threshold
    assert [r["unknown"] for r in rows] == [str(int(u)) for u in unknown]
    matrix = list(csv.reader(io.StringIO((folder / "confusion.csv").read_text())))
    assert matrix[0] == ["label", *NASTY] and sum(int(n) for r in matrix[1:] for n in r[1:]) == 60
    classes = list(csv.DictReader(io.StringIO((folder / "per_class.csv").read_text())))
    assert [c["class"] for c in classes] == NASTY and float(classes[0]["recall"]) <= 1
    assert sum(int(c["support"]) for c in classes) == 60


def test_the_same_again_is_the_same(written, tmp_path):
    _, *_, text = written
    assert write(tmp_path)[-1] == text


def test_many_classes_and_a_model_without_attention(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=40).eval()
    _, _, content, text = write(tmp_path, classes=40, images=90, model=model, calibrated=False)
    assert "No attention maps of this model: model: ResNet, expected timm&#x27;s" in text
    assert "The 30 of 40 classes with the most errors" in text and "class token" not in text
    assert content["calibration"] is None and "This model was not calibrated" in text
    assert text.count("<article>") == 6 and "after" not in content["reliability"]


def test_nothing_wrong_and_one_image(tmp_path):
    found = evaluation([[3.0, 0.0]], [0], ["a", "b"])
    content = report.write_report(
        tmp_path, {}, found, tiny(num_classes=2), Noise([0], ["a", "b"]), title="one",
        calibration=fit(found),
    )  # fmt: skip
    text = (tmp_path / "report.html").read_text()
    assert "No image was classified wrongly" in text and "Every image is classified" in text
    assert any(note.startswith("Classes without an image") for note in content["notes"])
    assert content["classes"][1]["recall"] is None


def test_cases_are_the_confident_errors_and_the_unsure(tmp_path):
    """Probabilities of the predicted class, larger with the row; the even rows are wrong."""
    logits = [[0.1 * (i + 1), 0.0] for i in range(30)]
    found = evaluation(logits, [1 - i % 2 for i in range(30)], ["a", "b"])
    chosen = report._chosen(found, 1.0)
    assert chosen == {"wrong": [28, 26, 24], "unsure": [0, 1, 2]}
    few = evaluation(logits[:2], [1, 0], ["a", "b"])
    assert report._chosen(few, 1.0) == {"wrong": [0], "unsure": [1]}, "no image twice"
    how = Calibration(1.0, Unknown("max_logit", 0.95, 1.0))
    (case,) = report._cases(found, [5], how)
    assert case["unknown"] and case["second"] == "b" and case["predicted"] == "a"


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("size, kind", [((28, 28), "png"), ((40, 300), "jpeg")])
@pytest.mark.parametrize("channels", [1, 3])
def test_thumbnails(size, kind, channels):
    uri = thumbnails.uri(np.full((*size, channels), 200, np.uint8))
    head, _, data = uri.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == f"data:image/{kind}" and thumbnails.SIDE <= max(image.size) <= 160
    assert abs(np.asarray(image).mean() - 200) < 2


def test_an_overlay_is_light_where_the_map_is():
    values = np.zeros((4, 4))
    values[0, 0] = 1
    drawn_over = thumbnails.overlay(np.zeros((8, 8, 3), np.uint8), values).astype(int).sum(2)
    assert drawn_over[0, 0] > 300 and drawn_over[-1, -1] < 20
    assert thumbnails.overlay(np.zeros((8, 8, 1), np.uint8), np.ones((2, 2))).shape == (112, 112, 3)


def test_ticks_are_round_numbers():
    assert charts.ticks(0, 1, 5) == [0, 0.5, 1] or charts.ticks(0, 1, 6)[1] == 0.2
    assert charts.ticks(52, 97, 5) == [60, 80] and charts.number(4e-4) == "4e-4"
    assert charts.number(12345.6) == "12,346" and charts.number(0.25) == "0.25"
    for low, high in ((0, 1e-5), (-3, 7), (1, 300)):
        assert all(low <= t <= high + 1e-9 for t in charts.ticks(low, high, 6))
