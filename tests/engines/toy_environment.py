"""A toy engine environment of three packages made on the spot: a wheel, a "torch" and one that comes as source."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from backend.engines.environments import Environment

BUILDER = """
import os, time, zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    import toy_library  # what is installed is there at build time: no isolation
    if hold := os.environ.get("TOY_HOLD"):
        open(hold + ".reached", "a").close()
        while os.path.exists(hold):  # a test decides how long the build takes
            time.sleep(0.05)
    name = "toy_engine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.writestr("toy_engine.py", "import toy_library\\nANSWER = toy_library.ANSWER + 1\\n")
        wheel.writestr("toy_engine-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: toy-engine\\nVersion: 1.0\\n"
                       "Requires-Dist: not-to-be-had\\n")
        wheel.writestr("toy_engine-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\n"
                       "Tag: py3-none-any\\n")
        wheel.writestr("toy_engine-1.0.dist-info/RECORD", "")
    return name
"""
PROBE = "import toy_engine\nassert toy_engine.ANSWER == 42\nprint('toy answers', toy_engine.ANSWER)\n"


def only_the_toys_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have pip and uv know the toy's packages in a folder alone, and pip be the only one that is told so."""
    for name in [n for n in os.environ if n.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder / "wheels"))
    monkeypatch.setenv("UV_CACHE_DIR", str(folder / "cache"))


def make_wheel(folder: Path, name: str, version: str, body: str) -> str:
    """A pure wheel with one module; returns its SHA-256."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(zipfile.ZipInfo(f"{name}.py"), body)
        wheel.writestr(
            zipfile.ZipInfo(f"{info}/METADATA"), f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            zipfile.ZipInfo(f"{info}/WHEEL"), "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(zipfile.ZipInfo(f"{info}/RECORD"), "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_source(folder: Path) -> str:
    """A source package with a build program of its own; returns its SHA-256."""
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "builder"\nbackend-path = ["."]\n',
        "builder.py": BUILDER,
        "PKG-INFO": "Metadata-Version: 2.1\nName: toy-engine\nVersion: 1.0\n",
    }
    path = folder / "toy_engine-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"toy_engine-1.0/{name}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_toy(folder: Path, probe: str = PROBE) -> Environment:
    """The toy's definition in `folder/definitions/toy` and its packages in `folder/wheels`."""
    wheels, definition = folder / "wheels", folder / "definitions" / "toy"
    wheels.mkdir(parents=True)
    definition.mkdir(parents=True)
    library = make_wheel(wheels, "toy_library", "1.0", "ANSWER = 41\n")
    make_wheel(wheels, "toy_torch", "2.0", "")
    engine = make_source(wheels)
    (definition / "environment.toml").write_text(
        'about = "A toy."\nkind = "engine"\npython = "3.11"\n[variables]\nTOY_WORKERS = 2\n'
    )
    (definition / "lock.txt").write_text(f"toy-library==1.0 --hash=sha256:{library}\n")
    (definition / "torch.txt").write_text("toy-torch==2.0\n")
    (definition / "source.txt").write_text(f"toy-engine==1.0 --hash=sha256:{engine}\n")
    (definition / "probe.py").write_text(probe)
    return Environment(definition, folder / "installed")
