# SPDX-License-Identifier: Apache-2.0
"""``affect show demo=true``: the page of a run, served to this machine alone, that reads photographs dropped on it.

A photograph goes from the browser to this process and back as a picture and a table; nothing is written, nothing leaves
the machine. The page may run its one script, known by its hash, and talk to this server only.
"""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Callable
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError
from rich.table import Table
from rich.text import Text

from affect.commands.face_pictures import MOST_BARS, frame_notes
from affect.commands.face_rows import Columns, make_rows
from affect.commands.predictor import Predictor, read_faces
from affect.data.images import DecodedPicture, open_encoded
from affect.data.video import Frame
from affect.errors import AffectError, ConfigError, DataError
from affect.geometry import FaceFinder
from affect.geometry.tracking import TrackedFace, find_faces
from affect.report.figures import annotate_faces
from affect.report.page import POLICY, html_table
from affect.report.predictions import decision_name

MEGABYTES, MEGAPIXELS = 32, 64
"""The largest file and picture that are read."""
_OWN_NAMES = ("127.0.0.1", "localhost", "[::1]")

_SCRIPT = """
const zone = document.getElementById("drop"), answer = document.getElementById("answer");
const file = document.getElementById("file");
async function read(image) {
  if (!image) return;
  zone.dataset.state = "reading";
  try {
    const response = await fetch("read", { method: "POST", body: image });
    const text = await response.text();
    if (response.ok) answer.innerHTML = text; else answer.textContent = text;
  } catch (error) { answer.textContent = "The server does not answer; was it ended?"; }
  zone.dataset.state = "done";
}
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => { event.preventDefault(); read(event.dataTransfer.files[0]); });
document.addEventListener("paste", (event) => read(event.clipboardData.files[0]));
file.addEventListener("change", () => { read(file.files[0]); file.value = ""; });
"""
_SECTION = f"""<h2>Try a photograph</h2>
<label id="drop" class="drop">Drop a photograph here, paste one, or <u>choose a file</u>.
<input type="file" id="file" accept="image/*" hidden></label>
<div id="answer" aria-live="polite"></div>
<script>{_SCRIPT}</script>
"""


def demo_policy() -> str:
    """Return the page's policy: that of a page that only shows, its own script, and requests to its own server."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    return f"{POLICY}; script-src 'sha256-{digest}'; connect-src 'self'"


def demo_section() -> str:
    """Return the part of the page that takes photographs."""
    return _SECTION


# -------------------------------------------------------------------------------------------------- one photograph


class PhotographReader:
    """Reads one photograph after the other.

    Args:
        predictor: The model.
        finder: Finds faces.
        scheme: Scheme of the finder's points.
    """

    def __init__(self, predictor: Predictor, finder: FaceFinder, scheme: str) -> None:
        self.predictor, self.finder = predictor, finder
        self.columns = Columns(predictor, scheme, {})
        self._one_at_a_time = threading.Lock()

    def __call__(self, data: bytes) -> str:
        """Return the annotated picture and a table of all values as HTML.

        Args:
            data: An encoded image.

        Raises:
            DataError: If it is none, or too large.
        """
        image = decode_upload(data)
        with self._one_at_a_time:
            faces = [TrackedFace(face, -1, detected=True) for face in find_faces(self.finder, [image])[0]]
            observations = [face.observation for face in faces]
            read = read_faces(self.predictor, [image] * len(faces), observations)
        rows = make_rows([Frame(0, None, image, "photograph")], [faces], read)
        tasks = self.predictor.tasks
        drawn = annotate_faces(image, frame_notes(rows, tasks).get(0, []), top=MOST_BARS)
        _, encoded = cv2.imencode(".jpg", cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 92])
        picture = base64.b64encode(encoded.tobytes()).decode()
        parts = [f'<figure><img alt="faces that were found" src="data:image/jpeg;base64,{picture}"></figure>']
        count = len(rows.seen)
        parts.append(f"<p>{count or 'no'} face{'s' if count != 1 else ''} found</p>")
        if count:
            table = self.columns.table(rows)
            parts += [html_table(self._values(name, table)) for name in tasks if tasks[name].landmark_scheme is None]
        return "\n".join(parts)

    def _values(self, name: str, table: pa.Table) -> Table:
        """Return the columns of a task as rows, a column for each face; what is decided to be there is marked."""
        shown = Table(title=name)
        shown.add_column("")
        for face in range(table.num_rows):
            shown.add_column(f"face {face}" if table.num_rows > 1 else "", justify="right")
        names = self.columns.by_task[name]
        for column in names:
            if column.endswith("_c") and column.removesuffix("_c") in names:
                continue
            decided = decision_name(column)
            there = table[decided].to_pylist() if decided in names else [None] * table.num_rows
            cells = [_cell(value, flag) for value, flag in zip(table[column].to_pylist(), there, strict=True)]
            shown.add_row(column, *cells)
        return shown


def _cell(value: object, there: int | None) -> Text:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return Text(text, style="green" if there else "")


def decode_upload(data: bytes) -> np.ndarray:
    """Return RGB uint8 ``(H, W, 3)`` of a photograph from a browser, turned as the camera noted.

    Raises:
        DataError: If it is no image, or has more than ``MEGAPIXELS``; that is read from its header.
    """
    array = np.frombuffer(data, np.uint8)
    name = Path("photograph")
    try:
        with Image.open(pa.BufferReader(data)) as header:
            width, height = header.size
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"not an image that can be read ({len(data)} bytes); take JPEG, PNG, WebP or BMP") from error
    if width * height > MEGAPIXELS * 10**6:
        raise DataError(f"{width} x {height} pixels; at most {MEGAPIXELS} million are read")
    picture = open_encoded(array, name)
    return picture.image if isinstance(picture, DecodedPicture) else picture.pixels()


# -------------------------------------------------------------------------------------------------- the server


def make_server(page: str, read: Callable[[bytes], str], port: int) -> ThreadingHTTPServer:
    """Return a server for browsers of this machine: ``/`` is the page, and an image sent to ``/read`` is read.

    Args:
        page: HTML.
        read: Returns HTML for the bytes of an image.
        port: 0 takes a free one.

    Raises:
        ConfigError: If the port cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60.0

        def do_GET(self) -> None:
            if not self._from_here():
                return
            found = urlsplit(self.path).path == "/"
            self._answer(*((HTTPStatus.OK, page) if found else (HTTPStatus.NOT_FOUND, "There is no such page.")))

        def do_POST(self) -> None:
            if not self._from_here():
                return
            size = self.headers.get("Content-Length", "")
            if urlsplit(self.path).path != "/read":
                self._answer(HTTPStatus.NOT_FOUND, "There is no such page.", drop=True)
            elif not size.isdecimal():
                self._answer(HTTPStatus.LENGTH_REQUIRED, "The length of the file is missing.", drop=True)
            elif int(size) > MEGABYTES * 2**20:
                message = f"{int(size) / 2**20:.0f} MiB; at most {MEGABYTES} are read."
                self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, drop=True)
            else:
                data = self.rfile.read(int(size))
                try:
                    self._answer(HTTPStatus.OK, read(data))
                except AffectError as error:
                    self._answer(HTTPStatus.BAD_REQUEST, str(error))

        def _from_here(self) -> bool:
            """Refuse pages of others, which reach this address under a name of theirs or from within a browser."""
            origin = self.headers.get("Origin")
            hosts = [self.headers.get("Host", ""), *([] if origin is None else [urlsplit(origin).netloc])]
            if all(host.rpartition(":")[0] in _OWN_NAMES or host in _OWN_NAMES for host in hosts):
                return True
            self._answer(HTTPStatus.FORBIDDEN, "Only pages of this machine are answered.", drop=True)
            return False

        def _answer(self, status: HTTPStatus, text: str, *, drop: bool = False) -> None:
            body = text.encode()
            kind = "text/html" if status is HTTPStatus.OK else "text/plain"
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("X-Frame-Options", "DENY")
            if drop:  # what was sent is not read
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Keep the terminal for what the user has to know."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"port={port}: {escape(str(error))}; port=0 takes a free one") from error
    server.daemon_threads = True
    return server
