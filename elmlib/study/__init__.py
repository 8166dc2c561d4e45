"""A study: a hyperparameter search, or a grid of variants, whose trials are executed notebooks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # names: __init__.pyi
