"""Makes `preceptor` importable from the checkout that a script lies in, whatever its folder's name.

Nothing is done where the package is installed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def ensure_importable() -> None:
    if "preceptor" in sys.modules or importlib.util.find_spec("preceptor") is not None:
        return
    spec = importlib.util.spec_from_file_location(
        "preceptor", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["preceptor"] = package
    spec.loader.exec_module(package)
