"""The training run around a plan: step count, progress, history, validation, callbacks. It sees public names only."""

from mlopt.engine.engine import Callback, Engine

__all__ = ["Callback", "Engine"]
