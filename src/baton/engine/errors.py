"""What can go wrong while a model is opened, under the name that the engine knows it by."""

from baton.text.errors import ModelError, bad_model

__all__ = ["ModelError", "bad_model"]
