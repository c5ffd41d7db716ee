"""What documents and code refer to is there."""

import re
from pathlib import Path

import pytest

from memvir.params import load_params

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8"))
    inside = [link for link in links if "://" not in link]
    assert inside and [link for link in inside if not (document.parent / link).exists()] == []


def test_code_cites_documents_of_this_repository():
    sources = [path for folder in ("memvir", "stages", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    cited = {name for path in sources for name in re.findall(r"[\w/]*[A-Z]+\.md\b", path.read_text(encoding="utf-8"))}
    assert "docs/METHOD.md" in cited and [name for name in cited if not (ROOT / name).exists()] == []


def test_a_clone_has_the_folder_source_of_every_recipe_which_dvc_wants_before_the_download():
    kept_by_git = ("annotation.csv", "README.md")
    for name in load_params(ROOT / "params.yaml").recipes:
        assert any((ROOT / "dataset" / name / "source" / file).is_file() for file in kept_by_git), name
