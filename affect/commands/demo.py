# SPDX-License-Identifier: Apache-2.0
"""``affect show demo=true``: the page of a run, served to this machine alone, that reads photographs dropped on it.

A photograph goes from the browser to this process and back as a picture and a table; nothing is written, nothing leaves
the machine. The page may run its one script, known by its hash, and talk to this server only.
"""

from __future__ import annotations

import base64
import hashlib
import io
import sys
import threading
import traceback
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError
from rich.table import Table
from rich.text import Text

from affect.commands.face_pictures import MOST_BARS, frame_notes
from affect.commands.face_rows import Columns, make_rows
from affect.commands.predictor import Predictor, read_faces
from affect.data.images import decode
from affect.data.video import Frame
from affect.errors import AffectError, ConfigError, DataError
from affect.geometry import FaceFinder
from affect.geometry.tracking import TrackedFace, find_faces
from affect.report.figures import annotate_faces
from affect.report.page import POLICY, html_table
from affect.report.predictions import decision_name

MEGABYTES, MEGAPIXELS, LONGEST_SIDE = 32, 64, 30_000
"""The largest file and picture that are read; what is drawn at a picture's side has room in a JPEG's 65,500 pixels."""
_PART = 2**16
"""Bytes that are sent at once: the time limit of a slow line is for each of them, not for the page."""
_OWN_NAMES = ("127.0.0.1", "localhost", "[::1]")

_SCRIPT = """
const zone = document.getElementById("drop"), answer = document.getElementById("answer");
const file = document.getElementById("file"), most = Number(zone.dataset.most);
let asked = 0;
async function read(files) {
  const mine = ++asked;
  let text, shown = false;
  zone.dataset.state = "reading";
  if (!files.length) text = "That was no file; save the picture first.";
  else if (files.length > 1) text = `These were ${files.length} files; one at a time is read.`;
  else if (files[0].size > most * 2**20) text = `More than ${most} MiB; take a smaller file.`;
  else try {
    const response = await fetch("read", { method: "POST", body: files[0] });
    text = await response.text();
    shown = response.ok;
  } catch (error) { text = "The server does not answer; was it ended?"; }
  if (mine !== asked) return;
  if (shown) answer.innerHTML = text; else answer.textContent = text;
  zone.dataset.state = "done";
}
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => { event.preventDefault(); read([...event.dataTransfer.files]); });
document.addEventListener("paste", ({ clipboardData: { files } }) => { if (files.length) read([...files]); });
file.addEventListener("change", () => { read([...file.files]); file.value = ""; });
"""
SECTION = f"""<h2>Try a photograph</h2>
<label id="drop" class="drop" data-most="{MEGABYTES}">Drop a photograph here, paste one, or <u>choose a file</u>.
<input type="file" id="file" accept="image/*"></label>
<div id="answer" aria-live="polite"></div>
<script>{_SCRIPT}</script>
"""
"""The part of the page that takes photographs."""


def demo_policy() -> str:
    """Return the page's policy: that of a page that only shows, its own script, and requests to its own server."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    return f"{POLICY}; script-src 'sha256-{digest}'; connect-src 'self'"


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
        with self._one_at_a_time:  # finders and networks are not made for several threads, nor memory for many pictures
            return self._read(decode_upload(data))

    def _read(self, image: np.ndarray) -> str:
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
            shown.add_column(f"face {face + 1}" if table.num_rows > 1 else "", justify="right")
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
        DataError: If it is no image, or larger than ``MEGAPIXELS`` or ``LONGEST_SIDE``, which its header tells.
    """
    most = f"at most {MEGAPIXELS} million are read, and {LONGEST_SIDE:,} in a row"
    unread = f"not an image that can be read ({len(data)} bytes); take JPEG, PNG, WebP or BMP"
    try:
        with Image.open(io.BytesIO(data)) as header:
            width, height = header.size
    except Image.DecompressionBombError as error:
        raise DataError(f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels; {most}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(unread) from error
    if width * height > MEGAPIXELS * 10**6 or max(width, height) > LONGEST_SIDE:
        raise DataError(f"{width} x {height} pixels; {most}")
    try:
        return decode(np.frombuffer(data, np.uint8), Path("photograph"))
    except DataError as error:  # it speaks of files of a data set
        raise DataError(unread) from error


# -------------------------------------------------------------------------------------------------- the server


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as the base has it
        """Be silent about browsers that went away; anything else is a mistake of this program."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def make_server(page: str, read: Callable[[bytes], str], port: int) -> ThreadingHTTPServer:
    """Return a server for browsers of this machine: ``/`` is the page, and an image sent to ``/read`` is read.

    Args:
        page: HTML.
        read: Returns HTML for the bytes of an image. Where it fails with an error that is none of this package's, the
            terminal tells which, the browser that there was one, and the server goes on.
        port: 0 takes a free one.

    Raises:
        ConfigError: If the port cannot be had.
    """
    require_port(port)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60.0

        def do_GET(self) -> None:
            if not self._from_here():
                return
            found = self.path.partition("?")[0] == "/"
            self._answer(*((HTTPStatus.OK, page) if found else (HTTPStatus.NOT_FOUND, "There is no such page.")))

        def do_POST(self) -> None:
            if not self._from_here():
                return
            size = self.headers.get("Content-Length", "")
            if self.path != "/read":
                self._answer(HTTPStatus.NOT_FOUND, "There is no such page.", drop=True)
            elif not size.isdecimal() or len(size) > 18:
                self._answer(HTTPStatus.LENGTH_REQUIRED, "The length of the file is missing.", drop=True)
            elif int(size) > MEGABYTES * 2**20:
                message = f"{int(size) / 2**20:.0f} MiB; at most {MEGABYTES} are read."
                self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, drop=True)
            else:
                data = self.rfile.read(int(size))
                if len(data) < int(size):  # the browser went away
                    self.close_connection = True
                    return
                self._answer(*answer_of(read, data))

        def _from_here(self) -> bool:
            """Refuse pages of others, which reach this address under a name of theirs or from within a browser."""
            host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
            own = host.rpartition(":")[0] in _OWN_NAMES or host in _OWN_NAMES
            if own and origin in (None, f"http://{host}"):
                return True
            self._answer(HTTPStatus.FORBIDDEN, "Only pages of this machine are answered.", drop=True)
            return False

        def _answer(self, status: HTTPStatus, text: str, *, drop: bool = False) -> None:
            body = text.encode(errors="replace")
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
            for start in range(0, len(body), _PART):
                self.wfile.write(body[start : start + _PART])

        def log_message(self, format: str, *args: object) -> None:
            """Keep the terminal for what the user has to know."""

    try:
        return _Server(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ConfigError(f"port={port}: {error.strerror}; port=0 takes a free one") from error


def require_port(port: object) -> None:
    """Refuse what is no port, before a model is read.

    Raises:
        ConfigError: If it is none.
    """
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 2**16:
        raise ConfigError(f"port={port}: give a whole number from 0 to 65535; 0 takes a free one")


def answer_of(read: Callable[[bytes], str], data: bytes) -> tuple[HTTPStatus, str]:
    """Return what a browser is told of an image, whatever happens while it is read."""
    try:
        return HTTPStatus.OK, read(data)
    except AffectError as error:
        return HTTPStatus.BAD_REQUEST, str(error)
    except Exception as error:  # the browser waits for an answer, and the next photograph may well be read
        traceback.print_exc()
        message = f"This photograph could not be read: {type(error).__name__}; the terminal tells more."
        return HTTPStatus.INTERNAL_SERVER_ERROR, message
