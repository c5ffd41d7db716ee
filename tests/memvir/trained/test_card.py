"""The model card."""

import pytest
from ruamel.yaml import YAML

from memvir.trained.card import model_card
from tests.models import metadata, settings


def front_matter(card: str) -> dict:
    _, head, _ = card.split("---\n", 2)
    return YAML(typ="safe").load(head)


def test_the_front_matter_is_what_model_hubs_read():
    head = front_matter(model_card(metadata(settings())))
    assert head["license"] == "unknown" and head["library_name"] == "memvir" and head["datasets"] == ["tiny"]
    ((result,),) = [entry["results"] for entry in head["model-index"]]
    assert result["dataset"]["name"] == "tiny"
    assert {metric["name"]: metric["value"] for metric in result["metrics"]} == {
        "Recall@1": 0.5,
        "R-precision": 0.25,
        "MAP@R": 0.125,
    }


def test_names_of_any_script_and_signs_of_yaml_stay_what_they_are():
    content = metadata(settings())
    content["run"] |= {"dataset": "鳥: \"#1\" 🐦 'x'"}
    assert front_matter(model_card(content))["datasets"] == [content["run"]["dataset"]]


def test_the_card_tells_data_recipe_metrics_and_how_to_use_the_model():
    content = metadata(settings())
    card = model_card(content)
    for text in (
        "# tiny/norm_softmax/1",
        'load_model("model.safetensors")',
        "2 training classes of `tiny`",
        "Network: convnet (widths: [4, 8], pooling",
        "Loss: Norm-SoftMax (scale 23)",
        "6 epochs of batches of 10",
        "| Recall@1 | 50.00 % |",
        "after epoch 6",
        "Trained from random weights",
    ):
        assert text in card
    assert card == model_card(content)


@pytest.mark.parametrize("license", [None, "apache-2.0"])
def test_the_card_tells_the_licence_of_the_weights_that_training_started_from(license):
    content = metadata(settings())
    content["weights"] = {"pretrained": "imagenet", "source": "https://example.org/w.pth", "sha256": "ab12"}
    if license:
        content["weights"]["license"] = license
    card = model_card(content)
    assert "started from imagenet weights, https://example.org/w.pth (sha256 ab12)" in card
    assert front_matter(card)["license"] == (license or "unknown")
    assert ("under the licence apache-2.0" if license else "states no licence") in card
