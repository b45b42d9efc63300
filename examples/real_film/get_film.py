"""Fetches *Big Buck Bunny* (596 s, 1280x720): `python3 examples/real_film/get_film.py FOLDER`.

The film, (c) copyright 2008 Blender Foundation, www.bigbuckbunny.org, CC-BY 3.0, is part of the
source distribution of moviepy 2.2.1, which pip downloads (58 MB) from whatever index it is set up
for. Standard library only. A film that is already there, with the right contents, is kept.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGE = "moviepy==2.2.1"
SDIST = "moviepy-2.2.1.tar.gz"
SDIST_SHA256 = "c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1"
ARCHIVE = "docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
MEMBER = "moviepy_10_minutes/resources/bbb.mp4"
FILM_SHA256 = "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(folder: Path) -> Path:
    """The source distribution, from pip's index; raises SystemExit when it is not what it was."""
    sdist = folder / SDIST
    if not (sdist.exists() and sha256(sdist) == SDIST_SHA256):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", "moviepy", "--dest", str(folder), PACKAGE]
        if subprocess.run(command).returncode != 0:
            raise SystemExit(
                f"real_film: pip could not download {PACKAGE}; check the network, or put {SDIST} "
                f"into {folder} yourself"
            )
    if (found := sha256(sdist)) != SDIST_SHA256:
        raise SystemExit(f"real_film: {sdist} has sha256 {found}, expected {SDIST_SHA256}")
    return sdist


def extract(sdist: Path, film: Path) -> None:
    """Writes the one file that is wanted; nothing else leaves the archives."""
    with tarfile.open(sdist) as outer:
        packed = outer.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/{ARCHIVE}")
        if packed is None:
            raise SystemExit(f"real_film: {sdist} does not hold {ARCHIVE}")
        inner_bytes = io.BytesIO(packed.read())
    partial = film.with_suffix(".part")
    with (
        zipfile.ZipFile(inner_bytes) as inner,
        inner.open(MEMBER) as source,
        partial.open("wb") as target,
    ):
        shutil.copyfileobj(source, target)
    if (found := sha256(partial)) != FILM_SHA256:
        raise SystemExit(f"real_film: {partial} has sha256 {found}, expected {FILM_SHA256}")
    partial.replace(film)


def get_film(folder: Path) -> Path:
    """Path of the film, fetched when it is not in the folder yet."""
    film = folder / "bbb.mp4"
    if film.exists() and sha256(film) == FILM_SHA256:
        print(f"real_film: {film} is there")
        return film
    print(f"real_film: fetching the film (58 MB) with pip into {folder}", flush=True)
    extract(download(folder / "download"), film)
    return film


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: {sys.argv[0]} FOLDER")
    get_film(Path(sys.argv[1]))
