"""Use of a trained adapter: summaries of texts, of vectors and of whole files, and questions to single vectors."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # names: __init__.pyi
