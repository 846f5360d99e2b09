"""The wheel that is built, away from the checkout: what users install, not what lies here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LUA_FILES = sorted(path.name for path in (ROOT / "lua").iterdir())

LOOK = """
import json
from pathlib import Path
import stable_openai
from stable_openai.backends.redis import script

package = Path(stable_openai.__file__).parent
print(json.dumps({
    "package": str(package),
    "typed": (package / "py.typed").is_file(),
    "lua": sorted(path.name for path in (package / "lua").glob("*")),
    "acquire": script("acquire")[0],
}))
"""


def run(*command: str, cwd: Path, path: str = "") -> str:
    """What a command printed, run where nothing but `path` leads to a package of ours."""
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel has been installed, by way of the sdist: `build` makes one from the other."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", f"{folder}/dist", str(ROOT), cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    installing = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", f"{folder}/site")
    run(sys.executable, *installing, str(wheel), cwd=folder)
    return folder / "site"


@pytest.fixture(scope="module")
def seen(site: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a program finds that imports the installed package."""
    empty = tmp_path_factory.mktemp("away")
    found: dict[str, Any] = json.loads(run(sys.executable, "-c", LOOK, cwd=empty, path=str(site)))
    assert Path(found["package"]) == site / "stable_openai"
    return found


def test_every_lua_file_is_in_the_wheel(seen: dict[str, Any]) -> None:
    assert seen["lua"] == LUA_FILES


def test_scripts_are_read_from_the_wheel(seen: dict[str, Any]) -> None:
    assert (ROOT / "lua" / "acquire.lua").read_text() in seen["acquire"]


def test_the_wheel_is_typed(seen: dict[str, Any]) -> None:
    assert seen["typed"]


def test_nothing_else_is_installed(site: Path) -> None:
    kept = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert kept <= {"stable_openai", "bin"}
    assert not list(site.rglob(".*"))
