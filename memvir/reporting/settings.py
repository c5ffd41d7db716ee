"""How figures are made."""

from typing import Annotated

from pydantic import Field

from memvir.sections import Section, Seed


class Reporting(Section):
    """How figures are made. Changing it re-trains nothing."""

    tsne_perplexity: Annotated[float, Field(ge=2, le=1000)] = 30.0
    """About how many neighbours a point of the t-SNE figure keeps near."""
    tsne_points: Annotated[int, Field(ge=10, le=20_000)] = 1000
    """At most so many embeddings a panel; every class weight is shown besides."""
    tsne_seed: Seed = 0
    """Seed of the t-SNE figure and of the choice of its points."""
    queries: Annotated[int, Field(ge=1, le=20)] = 2
    """Retrieval pictures: queries of each kind (best, typical, worst)."""
    neighbours: Annotated[int, Field(ge=1, le=20)] = 5
    """Nearest images shown for a query."""
