"""A trained model as one file, and what people do with it: embed, search, evaluate, export, share."""

from memvir.trained.model import TrainedModel, load_model

__all__ = ["TrainedModel", "load_model"]
