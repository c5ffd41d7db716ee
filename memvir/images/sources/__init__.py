"""Where images come from: each source is a class in a file of its own, and a line here.

Reading params.yaml imports all of them; what they need to do their work they import when they do it.
"""

import pkgutil
from typing import TYPE_CHECKING, Annotated, Union

from memvir.extras import require

require("experiment", "pandas", "pydantic", "scipy")

from pydantic import Field  # noqa: E402

from memvir.images.sources.source import Source  # noqa: E402

SOURCES = {
    "glyphs": "memvir.images.sources.glyphs:Glyphs",
    "cars196": "memvir.images.sources.cars196:Cars196",
    "cub200": "memvir.images.sources.cub200:Cub200",
    "sop": "memvir.images.sources.sop:Sop",
    "inshop": "memvir.images.sources.inshop:InShop",
    "grocery": "memvir.images.sources.grocery:Grocery",
    "folder": "memvir.images.sources.folder:OwnFolder",
}
"""What `data.source` can be -> the class of that section."""

if TYPE_CHECKING:
    Data = Source
else:
    Data = Annotated[Union[tuple(map(pkgutil.resolve_name, SOURCES.values()))], Field(discriminator="source")]  # noqa: UP007
