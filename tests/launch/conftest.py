"""What the tests of launch/ and docker/ share."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).parents[2]
PROFILES = {"gpu": REPO / "launch" / "values.yaml", "cpu": REPO / "launch" / "values-cpu.yaml"}
RENDERED = REPO / "launch" / "rendered"


def load_render() -> ModuleType:
    """launch/render.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("launch_render", REPO / "launch" / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def render() -> ModuleType:
    return load_render()


@pytest.fixture(scope="session")
def start_flags() -> set[str]:
    """Options of `ray start`, as its help lists them."""
    from ray.scripts.scripts import start

    return {option for parameter in start.params for option in parameter.opts}


def flags_of(command: str) -> set[str]:
    return set(re.findall(r"(?<=\s)--[a-z][a-z-]*", command))
