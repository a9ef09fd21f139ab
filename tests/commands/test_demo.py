# SPDX-License-Identifier: Apache-2.0
"""The demo reads what is dropped on its page, in a browser; it answers this machine alone and bad files in a line."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from omegaconf import DictConfig
from PIL import Image

from affect.commands import demo, predict, show
from affect.commands.predictor import open_predictor
from affect.errors import ConfigError, DataError
from affect.geometry import CropRecipe, FaceApiFinder
from affect.report.page import run_page
from affect.tasks import Attributes
from tests.commands.test_predict import read, release  # noqa: F401 - a fixture
from tests.commands.test_show import ATTACK, Reader, run_folder  # noqa: F401 - a fixture

data = pytest.importorskip("skimage.data")


@pytest.fixture(scope="module")
def photograph() -> bytes:
    return cv2.imencode(".png", cv2.cvtColor(data.astronaut(), cv2.COLOR_RGB2BGR))[1].tobytes()


@pytest.fixture(scope="module")
def reader(release: Path) -> demo.PhotographReader:  # noqa: F811
    return demo.PhotographReader(open_predictor(release), FaceApiFinder(), "68")


@contextlib.contextmanager
def served(page: str, answer: Callable[[bytes], str]) -> Iterator[int]:
    with demo.make_server(page, answer, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def request(
    port: int, method: str = "GET", path: str = "/", body: bytes | None = None, **headers: str
) -> tuple[int, str, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text, response


def test_values_are_those_of_predict(
    reader: demo.PhotographReader,
    release: Path,  # noqa: F811
    photograph: bytes,
    compose: Callable[..., DictConfig],
    tmp_path: Path,
) -> None:
    (tmp_path / "photograph.png").write_bytes(photograph)
    predict.run(compose("predict", f"checkpoint={release}", f"input={tmp_path / 'photograph.png'}", f"out={tmp_path}"))
    expected = read(tmp_path / "predictions.parquet")
    answer = reader(photograph)
    page = Reader(answer)
    assert "1 face found" in page.text
    for name in ("AU01", "AU02", "valence", "arousal"):
        assert f"{name}{expected[name][0]:.3f}" in page.text, name
    assert "_c" not in page.text, "a decision is a mark of its value"
    marked = set(re.findall(r'<tr><td>(\w+)</td><td class="right good">', answer))
    assert marked == {name for name in ("AU01", "AU02") if expected[f"{name}_c"][0]}
    [image] = [attributes for tag, attributes in page.tags if tag == "img"]
    kind, _, encoded = str(image["src"]).partition(",")
    assert kind == "data:image/jpeg;base64"
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(encoded), np.uint8), cv2.IMREAD_COLOR_RGB)
    drawn = cv2.imread(str(next((tmp_path / "annotated").iterdir())), cv2.IMREAD_COLOR_RGB)
    assert picture.shape == drawn.shape
    assert np.abs(picture.astype(int) - drawn).mean() < 4, "but for JPEG it is the picture of affect predict"


def test_no_face_is_an_answer(reader: demo.PhotographReader) -> None:
    answer = reader(cv2.imencode(".png", np.full((200, 200, 3), 90, np.uint8))[1].tobytes())
    assert "no faces found" in answer
    assert "<table" not in answer


def test_a_photograph_is_turned_as_the_camera_noted(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert demo.decode_upload((tmp_path / "turned.jpg").read_bytes()).shape == (40, 20, 3)


def test_several_faces_have_the_numbers_of_the_picture(
    reader: demo.PhotographReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[int]] = []
    monkeypatch.setattr(
        "affect.report.figures.annotate._draw_tag",
        lambda *arguments: drawn.append([int(arguments[-1])]) or [],
    )
    two = cv2.cvtColor(np.hstack([data.astronaut()] * 2), cv2.COLOR_RGB2BGR)
    answer = reader(cv2.imencode(".png", two)[1].tobytes())
    assert "2 faces found" in answer
    assert drawn == [[1], [2]]
    assert "face 1</th>" in answer
    assert "face 2</th>" in answer
    assert "face 0" not in answer


def test_names_of_a_stranger_are_text(photograph: bytes) -> None:
    class Stranger:
        tasks = {ATTACK: Attributes([ATTACK, "smile"])}  # noqa: RUF012
        recipe = CropRecipe(size=32)
        typical: dict[str, np.ndarray] = {}  # noqa: RUF012
        thresholds, delivered = None, False

        def predict(self, crops: np.ndarray) -> dict[str, np.ndarray]:
            return {ATTACK: np.full((len(crops), 2), 0.75, np.float32)}

    page = Reader(demo.PhotographReader(Stranger(), FaceApiFinder(), "68")(photograph))
    assert page.text.count(ATTACK) == 2, "the task's and the attribute's"
    assert {tag for tag, _ in page.tags} == {
        "figure",
        "img",
        "p",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }
    assert {name for _, attributes in page.tags for name in attributes} == {"alt", "src", "class"}


def picture(kind: str, mode: str, **options: Any) -> bytes:
    base = Image.new("I;16" if mode == "I;16" else mode, (40, 20), 25700 if mode == "I;16" else 100)
    stream = io.BytesIO()
    base.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "L"), ("PNG", "LA"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1"), ("PNG", "I;16"), ("JPEG", "CMYK"),
     ("JPEG", "L"), ("WEBP", "RGBA"), ("BMP", "RGB"), ("TIFF", "RGB")],
)  # fmt: skip
def test_every_usual_picture_becomes_colours(kind: str, mode: str) -> None:
    image = demo.decode_upload(picture(kind, mode))
    assert (image.shape, image.dtype) == ((20, 40, 3), np.uint8)


@pytest.mark.parametrize("content", [b"", b"<svg onload=alert(1)>", b"\xff\xd8 not a picture", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_is_refused(content: bytes) -> None:
    with pytest.raises(DataError, match=r"not an image that can be read .*; take JPEG, PNG, WebP or BMP"):
        demo.decode_upload(content)


def test_a_file_that_is_cut_short_is_not_told_of_as_one_of_a_data_set(photograph: bytes) -> None:
    with pytest.raises(DataError, match=r"^not an image that can be read \(60 bytes\); take JPEG"):
        demo.decode_upload(photograph[:60])


def test_an_image_cut_short_is_read_or_refused_but_never_crashes(photograph: bytes) -> None:
    for part in (100, 10_000, len(photograph) - 20):
        with contextlib.suppress(DataError):
            assert demo.decode_upload(photograph[:part]).shape == (512, 512, 3)


def test_too_many_pixels_are_refused_by_their_header() -> None:
    import struct
    import zlib

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    with pytest.raises(DataError, match=r"^more than \d+ million pixels; at most 64 million are read"):
        demo.decode_upload(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    wide = cv2.imencode(".png", np.zeros((8000, 8200), np.uint8))[1].tobytes()
    with pytest.raises(DataError, match="8200 x 8000 pixels; at most 64 million"):
        demo.decode_upload(wide)
    long = cv2.imencode(".png", np.zeros((2, 30_001), np.uint8))[1].tobytes()
    with pytest.raises(DataError, match=r"30001 x 2 pixels; .* 30,000 in a row"):
        demo.decode_upload(long)


def test_a_line_of_pixels_is_answered(reader: demo.PhotographReader) -> None:
    for shape in ((1, 1), (1, 30_000), (30_000, 3)):
        assert "no faces found" in reader(cv2.imencode(".png", np.zeros((*shape, 3), np.uint8))[1].tobytes()), shape


def test_only_this_machine_is_answered() -> None:
    asked: list[bytes] = []

    def answer(content: bytes) -> str:
        asked.append(content)
        return "<p>read</p>"

    with served("<p>page</p>", answer) as port:
        assert request(port)[:2] == (200, "<p>page</p>")
        assert request(port, Host=f"localhost:{port}")[0] == 200
        status, text, response = request(port, "POST", "/read", b"x", Origin=f"http://127.0.0.1:{port}")
        assert (status, text) == (200, "<p>read</p>")
        assert response.getheader("X-Content-Type-Options") == "nosniff"
        assert response.getheader("Cache-Control") == "no-store"
        for headers in (
            {"Host": f"evil.example:{port}"},  # a name of a stranger's that leads here
            {"Host": "127.0.0.1.evil.example"},
            {"Origin": "http://evil.example"},  # a stranger's page that asks for this address
            {"Origin": "null"},
            {"Origin": "http://["},
            {"Origin": f"http://localhost:{port + 1}"},  # another program of this machine
            {"Origin": f"https://127.0.0.1:{port}"},
        ):
            assert request(port, **headers)[0] == 403, headers
            assert request(port, "POST", "/read", b"y", **headers)[0] == 403, headers
        assert asked == [b"x"]
        assert request(port, "GET", "/../../etc/passwd")[0] == 404
        assert request(port, "POST", "/other", b"x")[0] == 404
        large = request(port, "POST", "/read", **{"Content-Length": str(33 * 2**20)})
        assert large[:2] == (413, "33 MiB; at most 32 are read.")
        for length in ("-1", "1e3", "9" * 5000):
            assert request(port, "POST", "/read", **{"Content-Length": length})[0] == 411
        assert asked == [b"x"]


def test_errors_are_text() -> None:
    def answer(content: bytes) -> str:
        raise DataError("<b>no</b>")

    with served("", answer) as port:
        status, text, response = request(port, "POST", "/read", b"x")
    assert (status, text, response.getheader("Content-Type")) == (400, "<b>no</b>", "text/plain; charset=utf-8")


def test_an_error_of_the_program_is_an_answer_and_the_next_photograph_is_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answer(content: bytes) -> str:
        if content == b"x":
            raise ZeroDivisionError("deep inside")
        return "<p>read</p>"

    with served("", answer) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for content, expected in ((b"x", 500), (b"y", 200)):  # on one line to the browser
            connection.request("POST", "/read", content)
            response = connection.getresponse()
            text = response.read().decode()
            assert response.status == expected
            assert ("ZeroDivisionError; the terminal tells more" in text) == (expected == 500)
            assert "deep inside" not in text
        connection.close()
    assert "ZeroDivisionError: deep inside" in capsys.readouterr().err


def test_a_browser_that_goes_away_is_not_the_terminals_matter(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[bytes] = []
    gone = threading.Event()

    def answer(content: bytes) -> str:
        asked.append(content)
        gone.wait(10)
        return "<p>read</p>" * 10**6

    head = "POST /read HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n"
    with served("<p>page</p>", answer) as port:
        for sent in ("x", "12345"):
            line = socket.create_connection(("127.0.0.1", port))
            line.sendall((head + sent).encode())
            if sent == "12345":
                while not asked:
                    time.sleep(0.01)
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset, not ended
            line.close()
        gone.set()
        assert request(port)[0] == 200
        time.sleep(0.2)
    assert asked == [b"12345"], "what was cut short is not read"
    assert capsys.readouterr().err == ""


def test_the_page_is_served_while_a_browser_is_open(
    compose: Callable[..., DictConfig],
    run_folder: Path,  # noqa: F811
    release: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(release, run_folder / "release", dirs_exist_ok=True)
    servers, seen = [], []
    make = demo.make_server

    def made(*arguments: Any) -> Any:
        servers.append(make(*arguments))
        return servers[-1]

    def browse(address: str) -> bool:
        try:
            with urllib.request.urlopen(address, timeout=10) as page:
                seen.append(page.read().decode())
        finally:
            servers[0].shutdown()
        return True

    monkeypatch.setattr(demo, "make_server", made)
    monkeypatch.setattr(webbrowser, "open", browse)
    show.run(compose("show", f"run={run_folder}", "demo=true", "port=0", "open=true"))
    assert "Try a photograph" in seen[0]


@pytest.mark.parametrize("port", [-1, 65536, 80.5, "web", None, True])
def test_what_is_no_port_is_refused_at_once(
    port: Any,
    compose: Callable[..., DictConfig],
    run_folder: Path,  # noqa: F811
) -> None:
    with pytest.raises(ConfigError, match=rf"^port={port}: give a whole number from 0 to 65535"):
        demo.make_server("", str, port)
    config = compose("show", f"run={run_folder}", "demo=true")
    config.port = port
    with pytest.raises(ConfigError, match=rf"^port={port}: "):
        show.run(config)


def test_a_port_that_is_taken_is_named() -> None:
    with served("", str) as port, pytest.raises(ConfigError, match=rf"port={port}: .*; port=0 takes a free one"):
        demo.make_server("", str, port)


def test_a_demo_writes_no_page(compose: Callable[..., DictConfig], run_folder: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match="demo=true serves the page and writes none"):
        show.run(compose("show", f"run={run_folder}", "demo=true", "out=page.html"))


def test_the_page_runs_its_own_script_only(run_folder: Path) -> None:  # noqa: F811
    page = run_page(run_folder, demo.SECTION, demo.demo_policy())
    [policy] = [attributes["content"] for tag, attributes in Reader(page).tags if "http-equiv" in attributes]
    assert re.search(r"default-src 'none'; .*script-src 'sha256-[\w+/=]+'; connect-src 'self'$", str(policy))
    assert "script" not in {tag for tag, _ in Reader(run_page(run_folder)).tags}


def test_a_release_has_a_page_of_its_card(release: Path) -> None:  # noqa: F811
    page = Reader(run_page(release, demo.SECTION, demo.demo_policy()))
    assert release.name in page.text
    assert "Model cardcard" in page.text
    assert "drop" in {attributes.get("id") for _, attributes in page.tags}


# -------------------------------------------------------------------------------------------------- in a browser


class Browser:
    """Chromium without a window, driven through its debugging pipe: messages of JSON, each ended by a zero byte."""

    def __init__(self, program: str, profile: Path) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # The pipe's ends have to be the descriptors 3 and 4 of the browser.
        shell = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, program, *options, "about:blank"],
            pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._numbers, self._rest, self._session = itertools.count(1), b"", {}
        pages = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": arguments, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                got = os.read(self._read, 1 << 20)
                assert got, "the browser ended"
                self._rest += got
            line, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def run(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self) -> np.ndarray:
        encoded = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        return cv2.imdecode(np.frombuffer(base64.b64decode(encoded), np.uint8), cv2.IMREAD_COLOR_RGB)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)


DROP = """
new Promise((resolve) => {
  const zone = document.getElementById("drop");
  new MutationObserver(() => { if (zone.dataset.state === "done") resolve(true); })
    .observe(zone, { attributes: true });
  const bytes = Uint8Array.from(atob("%s"), (letter) => letter.charCodeAt(0));
  const dropped = new DataTransfer();
  for (let k = 0; k < %d; k++) dropped.items.add(new File([bytes], "photograph.png"));
  zone.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, bubbles: true, cancelable: true }));
})
"""


@pytest.mark.slow
def test_a_photograph_dropped_in_a_browser_is_read(
    reader: demo.PhotographReader,
    run_folder: Path,  # noqa: F811
    photograph: bytes,
    tmp_path: Path,
) -> None:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium here")
    page = run_page(run_folder, demo.SECTION, demo.demo_policy())
    with served(page, reader) as port, contextlib.closing(Browser(program, tmp_path / "profile")) as browser:
        browser.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
        while not browser.run("document.readyState === 'complete' && !!document.getElementById('drop')"):
            pass
        assert browser.run(DROP % (base64.b64encode(photograph).decode(), 1))
        told = browser.run("document.getElementById('answer').innerText")
        assert "1 face found" in told, told
        assert "AU01" in told
        shown = browser.run("document.querySelector('#answer img').naturalWidth")
        assert shown >= 512, "the page's policy shows the picture"
        cv2.imwrite(str(tmp_path / "page.png"), cv2.cvtColor(browser.picture(), cv2.COLOR_RGB2BGR))
        assert browser.run(DROP % (base64.b64encode(b"no picture").decode(), 1))
        told = browser.run("document.getElementById('answer').innerText")
        assert told.startswith("not an image that can be read"), told
        for count, expected in ((0, "That was no file"), (2, "These were 2 files")):
            assert browser.run(DROP % ("", count))
            assert browser.run("document.getElementById('answer').innerText").startswith(expected)
        browser.run(f"read([{{ size: {33 * 2**20} }}])")
        assert browser.run("document.getElementById('answer').innerText").startswith("More than 32 MiB")
        browser.run("document.body.append(Object.assign(document.createElement('script'), {text: 'window.bad = 1'}))")
        assert browser.run("window.bad === undefined"), "the page's policy runs no other script"
