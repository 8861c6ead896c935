"""Pinned packages: where their Python source is read from, without running any of it."""

import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from importlib.metadata import Distribution, distributions
from pathlib import Path

SPDX = (
    "MIT, MIT-0, MIT-CMU, 0BSD, BSD-2-Clause, BSD-3-Clause, Apache-2.0, Apache-2.0 WITH LLVM-exception, PSF-2.0, "
    "Python-2.0, ISC, HPND, Zlib, BSL-1.0, CC0-1.0"
)
OTHER_NAMES = (
    "MIT License, BSD, BSD License, 3-Clause BSD License, Apache Software License, Apache 2.0, Apache 2.0 License, "
    "Python Software Foundation License, ISC License (ISCL)"
)
PERMISSIVE = frozenset(name.lower() for name in f"{SPDX}, {OTHER_NAMES}".split(", "))
"""Licences that are permissive, by SPDX identifier or as classifiers and older metadata call them, in lower case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """One line of packages.txt; `split` is train, validation or test."""

    name: str
    version: str
    split: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One package's source: `files` is (path, text) in path order."""

    pin: Pin
    licence: str
    files: list[tuple[str, str]]


def read_pins(path: Path) -> list[Pin]:
    """The pins of a file of `name==version split` lines, in order; `#` opens a comment."""
    rows = [line.split("#")[0].split() for line in path.read_text().splitlines()]
    return [Pin(name=r[0].split("==")[0], version=r[0].split("==")[1], split=r[1]) for r in rows if r]


def licence_of(metadata: Message) -> str:
    """The licence a METADATA header names, '' where it names none; of a whole licence text its first line."""
    classifiers = [c for c in metadata.get_all("Classifier", []) if c.startswith("License ::")]
    named = metadata.get("License-Expression") or "; ".join(c.split("::")[-1].strip() for c in classifiers)
    first = str(metadata.get("License", "")).strip().partition("\n")[0]
    return " ".join((named or first).split())


def is_permissive(licence: str) -> bool:
    """Whether all the licences that are named are permissive, or one of each choice; what is not known is not."""

    def is_known(expression: str) -> bool:
        return all(name.strip().lower() in PERMISSIVE for name in expression.split(" AND "))

    return all(any(map(is_known, part.split(" OR "))) for part in licence.split(";"))


def read_installed(pin: Pin, distribution: Distribution) -> Package:
    """The source of an installed distribution."""
    headers = HeaderParser().parsestr(distribution.read_text("METADATA") or "")
    names = sorted(str(f) for f in distribution.files or [] if str(f).endswith(".py"))
    paths = ((name, Path(str(distribution.locate_file(name)))) for name in names if ".." not in name)
    texts = ((name, decode(path.read_bytes())) for name, path in paths if path.is_file())
    return Package(pin=pin, licence=licence_of(headers), files=[(n, t) for n, t in texts if t])


def read_wheel(pin: Pin, wheel: Path) -> Package:
    """The source inside a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(metadata).decode())
        texts = [(name, decode(archive.read(name))) for name in names if name.endswith(".py")]
    return Package(pin=pin, licence=licence_of(headers), files=[(n, t) for n, t in texts if t])


def decode(source: bytes) -> str:
    """The text of a UTF-8 source file with unix line ends, '' where it is not UTF-8."""
    try:
        return source.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return ""


def canonical(name: str) -> str:
    """A project name as file names spell it: lower case, underscores."""
    return name.lower().replace("-", "_").replace(".", "_")


def installed(sites: Sequence[Path]) -> dict[tuple[str, str], Distribution]:
    """The distributions in these folders by (canonical name, version without a local part)."""
    found = distributions(path=[str(site) for site in sites])
    return {(canonical(d.metadata["Name"]), d.version.split("+")[0]): d for d in found}


def download(pins: Iterable[Pin], folder: Path) -> None:
    """Fetches the wheels of these pins into `folder` with pip; raises where one has no wheel."""
    wanted = [f"{pin.name}=={pin.version}" for pin in pins]
    flags = ["--no-deps", "--only-binary=:all:", "--quiet", "-d", str(folder)]
    if wanted:
        subprocess.run([sys.executable, "-m", "pip", "download", *flags, *wanted], check=True)  # noqa: S603


def wheel_of(pin: Pin, folder: Path) -> Path | None:
    """The wheel of a pin in `folder`, None where it is not there."""
    wheels = sorted(folder.glob("*.whl"))
    wanted = (canonical(pin.name), pin.version)
    return next((w for w in wheels if (canonical(w.name.split("-")[0]), w.name.split("-")[1]) == wanted), None)


def read_packages(pins: Sequence[Pin], sites: Sequence[Path], wheels: Path) -> Iterator[Package]:
    """Each pinned package, in order, from an installed copy or a wheel; raises FileNotFoundError."""
    here = installed(sites)
    for pin in pins:
        distribution = here.get((canonical(pin.name), pin.version))
        if distribution is not None:
            yield read_installed(pin, distribution)
        elif wheel := wheel_of(pin, wheels):
            yield read_wheel(pin, wheel)
        else:
            raise FileNotFoundError(f"{pin.name}=={pin.version} is neither installed nor downloaded")
