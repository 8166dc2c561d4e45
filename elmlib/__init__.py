"""elmlib: a frozen language model learns to read a text embedding.

The names below are imported when they are first used: `import elmlib` loads neither torch nor transformers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # names: __init__.pyi


def version_line() -> str:
    """Versions of Python, elmlib, torch and transformers, and the device: the second cell of every notebook."""
    import platform
    from importlib.metadata import version

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = ", ".join(f"{name} {version(name)}" for name in ("elmlib", "torch", "transformers"))
    return f"Python {platform.python_version()}, {versions}, {device}"
