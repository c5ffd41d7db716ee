"""The embedded data set: characters rendered from the typefaces that Matplotlib ships.

It takes the road of CARS196: an archive of numbered images and a table of runs, which `prepare` rearranges. The
archive is a function of the recipe's `data` section and of the table of characters alone, byte for byte.
"""

import io
import itertools
import tarfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from memvir.files import atomic_write, write_json
from memvir.images.annotation import read_annotation, write_annotation
from memvir.images.plans import by_number
from memvir.images.sources.source import Source
from memvir.progress import counted
from memvir.sections import Seed, Side

ARCHIVE = "glyph_ims.tar"
ANNOTATION = "annotation.csv"


class Glyphs(Source):
    source: Literal["glyphs"]
    images_per_class: Annotated[int, Field(ge=2, le=1000)]
    """Rendered instances of each character."""
    test_images_per_class: Annotated[int, Field(ge=2, le=1000)] | None = None
    """Those of the characters that test; null: as many. More make figures that differ less from seed to seed."""
    size: Side
    """Side of a rendered image in pixels."""
    seed: Seed
    """Seed of the distortions; the data set is a function of this section alone."""

    def download(self, source: Path, target: Path) -> None:
        """Render the archive and its annotation into `target`."""
        from memvir.images.glyph_drawings import check_coverage, class_name, png, read_characters, render

        characters = read_characters(source / ANNOTATION)
        check_coverage(characters, source / ANNOTATION)
        ends = list(itertools.accumulate(self._counts(len(characters))))  # the last image of each class
        starts = [0, *ends]
        rendered = (
            image
            for class_id, (character, start, end) in enumerate(zip(characters, starts, ends, strict=False), 1)
            for image in render(character, class_id, end - start, self.size, self.seed)
        )
        images = counted(rendered, "rendering glyphs", ends[-1], "images")
        with (
            atomic_write(target / ARCHIVE) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for number, image in enumerate(images, 1):
                content = png(image)
                member = tarfile.TarInfo(f"glyph_ims/{number:06}.png")  # its date and owner stay at zero
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        rows = [(starts[i] + 1, ends[i], i + 1, class_name(c)) for i, c in enumerate(characters)]
        write_annotation(target / ANNOTATION, rows)
        write_json(target / "source.json", {"source": "rendered from the typefaces of Matplotlib", "path": ARCHIVE})

    def _counts(self, num_classes: int) -> list[int]:
        """How many images each class has; the first half of the classes is for training, as `annotation` has it."""
        train = num_classes // 2
        test = self.test_images_per_class or self.images_per_class
        return [self.images_per_class] * train + [test] * (num_classes - train)

    def prepare(self, source: Path, download: Path, images: Path, index: Path) -> None:
        """Rearrange the archive into images/{train,test}/CLASS/* and write the index."""
        from memvir.images.archives import open_archive
        from memvir.images.arrangement import arrange

        classes = read_annotation(download / ANNOTATION)
        with open_archive(download / ARCHIVE) as archive:
            arrange(archive, by_number(classes, archive), images, index)
