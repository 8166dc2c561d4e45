"""Records, embeddings, prompts and splits. Names load when they are first used, so that light ones load no torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # names: __init__.pyi
