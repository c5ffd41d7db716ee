"""What a search found as one self-contained page: no network, no scripts, readable on a phone, light and dark."""

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from PIL import Image

from memvir.images.decode import load, read_file

THUMBNAIL = 320  # pixels of the longer side: sharp on screens of two device pixels per CSS pixel


ICON = 64
"""Pictures up to this are kept to the pixel, and shown in squares rather than blurred."""


@dataclass(frozen=True)
class Found:
    path: Path
    name: str
    similarity: float

    @property
    def shown_similarity(self) -> str:
        return f"{self.similarity:.3f}".replace("-", "−")

    @property
    def shown_name(self) -> str:
        return legible(self.name)

    @property
    def shown_parts(self) -> list[str]:
        """The folders, from the outermost, and the file."""
        return self.shown_name.split("/")


@dataclass(frozen=True)
class Query:
    path: Path
    found: Sequence[Found]
    """Nearest first."""

    @property
    def shown_name(self) -> str:
        return legible(self.path.name)


def render_page(queries: Sequence[Query], model: str, folder: Path, pictures: int) -> str:
    """The page as HTML. `pictures` is how many of the folder were searched."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string((files("memvir.trained") / "page.html").read_text(encoding="utf-8"))
    folder_name = legible(folder.resolve().name)
    shown = dict.fromkeys(path for query in queries for path in (query.path, *(item.path for item in query.found)))
    numbers = {path: number for number, path in enumerate(shown)}
    sources = [thumbnail(path) for path in shown]
    return template.render(
        queries=queries, numbers=numbers, sources=sources, model=legible(model), folder=folder_name, pictures=pictures
    )


def thumbnail(path: Path) -> str:
    """The picture, as the network's are decoded, small and as a data URI. Raises UserError if it cannot be read."""
    picture = load(read_file(path), str(path))
    kind = "png" if max(picture.size) <= ICON else "jpeg"
    if max(picture.size) > THUMBNAIL:
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def legible(name: str) -> str:
    """A file's name as text, whatever bytes it is made of."""
    return os.fsencode(name).decode(errors="replace")
