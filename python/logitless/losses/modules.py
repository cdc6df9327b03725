"""All modules of this package: importing this one imports them, from a folder or from an archive.

It is a module of its own because `torch.compile` traces an import statement, but no call that imports.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from . import __path__

MODULES = tuple(import_module(module.name) for module in pkgutil.walk_packages(__path__, f"{__package__}."))
