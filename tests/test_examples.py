"""The examples run, and the server gives each client its own predictions."""

import asyncio
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import selection
from checking import SIXTH_DIGIT, assert_at_most

import deit_fast

ROOT = Path(__file__).parent.parent
PHOTOS = sorted((Path(deit_fast.__file__).parent / "data").glob("*.jpg"))


def run(example, *args):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / example, *map(str, args)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_classify_folder(tmp_path):
    photos, bad = tmp_path / "photos", tmp_path / "bad" / "bad.png"
    for path in (photos, bad.parent):
        path.mkdir()
    bad.write_bytes(b"none")
    copies = [shutil.copy(photo, photos) for photo in PHOTOS]
    done = run("classify_folder.py", photos, bad.parent, "--no-pretrained", "--model", "deit_tiny")
    entries = [json.loads(line) for line in done.stdout.splitlines()]
    assert [e["image"] for e in entries] == [*map(str, copies), str(bad)]
    assert [len(e.get("predictions", ())) for e in entries] == [3, 3, 3, 3, 0]
    assert re.search(r"5 images, \d+% of the time", done.stderr)


@pytest.mark.slow
def test_swap_into_timm():
    out = run("swap_into_timm.py", "--batch", "2").stdout
    assert "12 Attention" in out and "the same parameters: True" in out
    assert re.search(r"logits: \d\.\de-0[5-9]", out)
    assert re.search(r"images/s on this \w+: [\d.]+ before, [\d.]+ after", out)


TOUR = (ROOT / "examples" / "tour.py").read_text()


@pytest.mark.slow
def test_tour(tmp_path):
    """From standard input, as a notebook's cells: without `__file__`, and anywhere."""
    selection.extra("train", "matplotlib")
    done = subprocess.run(
        [sys.executable, "-"], input=TOUR, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "12 Attention" in done.stdout
    assert re.search(r"logits against timm's: \d\.\de-\d+ .*, \d\.\de-\d+ from bytes", done.stdout)
    for name in ("timm", "deit_fast", "deit_fast, engine"):
        assert re.search(
            rf"^{name}: [\d.,]+ images/s at batch \d+, [\d.]+ times", done.stdout, re.M
        )
    classes = re.findall(r"^([a-z-]+): (\w.*) \(\d+%\)$", done.stdout, re.M)
    plain = [
        (stem, label.lower().replace(" ", "-").removesuffix("/top")) for stem, label in classes
    ]
    assert len(plain) == 10 and all(stem == label for stem, label in plain)
    for fmt in ("fp8", "int8"):
        line = rf"{fmt}: 16 layers, .* the same class for (9|10) of 10 images|{fmt}: .*capability"
        assert re.search(line, done.stdout)
    assert (tmp_path / "tour.png").read_bytes().startswith(b"\x89PNG")


def test_tour_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    last_cell = TOUR.rpartition("# %%")[2]
    exec(compile(last_cell, "tour.py", "exec"), {"find_spec": importlib.util.find_spec})
    assert "matplotlib is not installed; pip install 'deit_fast[train]'" in capsys.readouterr().out


@pytest.fixture(scope="module")
def server():
    selection.extra("serve", "fastapi", "uvicorn")
    selection.extra("all", "httpx")
    import httpx

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, ROOT / "examples/serve_http.py", "--model", "deit_tiny_distilled"]
    options = ["--no-pretrained", "--port", port, "--batch", 8, "--queue", 40]
    options += ["--max-bytes", 300_000]
    process = subprocess.Popen([*command, *map(str, options)], stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while True:
        try:
            assert httpx.get(f"{url}/health").json()["status"] == "ok"
            break
        except httpx.TransportError:
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.2)
    yield url
    process.terminate()
    process.wait(10)


def predicted():
    """What each photograph is, from the command line."""
    command = [Path(sys.executable).with_name("deit-fast"), "classify", "--json", "--topk", "3"]
    done = subprocess.run(
        [*command, "--no-pretrained", "--model", "deit_tiny_distilled", *PHOTOS],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [entry["predictions"] for entry in json.loads(done.stdout)]


@pytest.mark.slow
def test_server_under_load(server):
    """Many clients at once: no response is lost, and none is for another client."""
    import httpx

    expected, bodies = predicted(), [p.read_bytes() for p in PHOTOS]
    kinds, refused = [0, 1, 2, 3, "bad"] * 24, []
    before = httpx.get(f"{server}/health").json()

    async def client(http, kind):
        body = b"no image" if kind == "bad" else bodies[kind]
        while True:
            response = await http.post(f"{server}/classify?topk=3", content=body)
            if response.status_code != 503:
                return kind, response
            assert response.headers["retry-after"] == "1"
            refused.append(kind)
            await asyncio.sleep(0.05)

    async def load():
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(timeout=120, limits=limits) as http:
            return await asyncio.gather(*(client(http, kind) for kind in kinds))

    responses = asyncio.run(load())
    assert Counter(kind for kind, _ in responses) == Counter(kinds)
    for kind, response in responses:
        if kind == "bad":
            assert response.status_code == 400
            assert response.json()["detail"] == "body: cannot identify image file"
            continue
        assert response.status_code == 200
        found = response.json()["predictions"]
        assert [p["class"] for p in found] == [p["class"] for p in expected[kind]]
        for one, other in zip(found, expected[kind], strict=True):
            assert_at_most(abs(one["score"] - other["score"]), SIXTH_DIGIT, "score")
    after = httpx.get(f"{server}/health").json()
    assert refused, "64 clients, 40 places"
    assert after["in_flight"] == 0
    assert 96 / 8 <= after["batches"] - before["batches"] < 96, "requests were not batched"


@pytest.mark.slow
@pytest.mark.parametrize(
    "path, body, status, message",
    [
        ("/classify", b"", 400, "body: empty"),
        ("/classify", PHOTOS[0].read_bytes()[:5000], 400, "body: "),
        ("/classify", os.urandom(300_001), 413, "body: more than 300000 bytes"),
        ("/classify?topk=0", b"x", 422, "greater than or equal to 1"),
        ("/classify?topk=21", b"x", 422, "less than or equal to 20"),
        ("/classify?topk=two", b"x", 422, "valid integer"),
        ("/nowhere", b"x", 404, "Not Found"),
    ],
)
def test_bad_requests(server, path, body, status, message):
    import httpx

    response = httpx.post(server + path, content=body)
    assert response.status_code == status and message in response.text


@pytest.mark.slow
def test_a_body_of_unknown_length_is_cut_off(server):
    import httpx

    sent = 0

    def endless():
        nonlocal sent
        for _ in range(10_000):
            sent += 100_000
            yield bytes(100_000)

    try:
        response = httpx.post(f"{server}/classify", content=endless())
        assert response.status_code == 413
    except httpx.TransportError:
        pass  # the server hung up
    assert sent < 100_000_000
    assert httpx.get(f"{server}/health").json()["status"] == "ok"


@pytest.mark.slow
def test_a_client_that_hangs_up_harms_nobody(server):
    import httpx

    body = PHOTOS[1].read_bytes()
    for _ in range(5):
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{server}/classify", content=body, timeout=0.002)
    response = httpx.post(f"{server}/classify?topk=1", content=body, timeout=60)
    assert response.status_code == 200


@pytest.mark.slow
def test_a_folder_is_served_with_its_calibration(tmp_path):
    selection.extra("serve", "fastapi", "uvicorn")
    selection.extra("all", "httpx")
    import httpx
    from saved_models import tiny

    from deit_fast import calibration

    spec = importlib.util.spec_from_file_location("serve_http", ROOT / "examples/serve_http.py")
    serve_http = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve_http)

    async def answer(threshold):
        model = tiny()
        known = calibration.Unknown("max_logit", threshold, 1.0)
        calibration.attach(model, calibration.Calibration(1.5, known))
        app = serve_http.create_app(model, 4, unknown=True)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as http,
        ):
            body = PHOTOS[0].read_bytes()
            return (await http.post("/classify?topk=2", content=body)).json()

    known, unknown = (asyncio.run(answer(threshold)) for threshold in (-1e9, 1e9))
    assert len(known["predictions"]) == 2 and known["unknown"] is False
    assert unknown == {"predictions": [], "unknown": True}
