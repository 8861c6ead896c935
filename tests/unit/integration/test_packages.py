"""Packages of the training text: which licences count as permissive, and what metadata name."""

from __future__ import annotations

import json
from email.parser import HeaderParser
from pathlib import Path

import pytest

from integration.training import packages
from integration.training.packages import is_permissive, licence_of, read_pins

TRAINING = Path(packages.__file__).parent
RECORDED = json.loads((TRAINING / "corpus.json").read_text())


@pytest.mark.parametrize(
    "licence",
    [
        "MIT",
        "mit license",
        "Apache-2.0 OR GPL-3.0-only",
        "BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0",
        "MIT License; Apache Software License",
        "MIT AND MPL-2.0 OR Apache-2.0",
        "GPL-2.0-only AND MIT OR BSD-3-Clause AND MIT",
    ],
)
def test_permissive_licences_pass(licence: str) -> None:
    assert is_permissive(licence)


@pytest.mark.parametrize(
    "licence",
    [
        "",
        "Limited Licence",  # has "mit" in it
        "BSDish",
        "Miscellaneous",  # has "isc" in it
        "GPL-3.0-only",
        "MIT AND GPL-3.0-only",
        "MIT AND GPL-3.0-only OR BSD-3-Clause AND GPL-3.0-only",
        "MIT License; Mozilla Public License 2.0 (MPL 2.0)",
        "Apache-2.0 WITH Commons-Clause",
        "LGPL-2.1 OR MPL-2.0",
        "License agreement for matplotlib versions 1.3.0 and later",
    ],
)
def test_other_and_unknown_licences_do_not(licence: str) -> None:
    assert not is_permissive(licence)


@pytest.mark.parametrize("row", RECORDED, ids=lambda row: row["id"])
def test_every_package_that_was_trained_on_is_permissive(row: dict[str, str]) -> None:
    assert is_permissive(row["licence"]), row["licence"]


def test_what_was_trained_on_is_what_is_pinned() -> None:
    pins = {(f"{pin.name}=={pin.version}", pin.split) for pin in read_pins(TRAINING / "packages.txt")}
    assert {(row["id"], row["split"]) for row in RECORDED} == pins


@pytest.mark.parametrize(
    ("headers", "licence"),
    [
        ("License-Expression: MIT\nLicense: other\nClassifier: License :: OSI Approved :: BSD License", "MIT"),
        ("License: long text\nClassifier: License :: OSI Approved :: BSD License", "BSD License"),
        (f"License-Expression: {' AND '.join(['MIT'] * 30)}", " AND ".join(["MIT"] * 30)),
        ("License: Apache  2.0\n        and then the whole text", "Apache 2.0"),
        ("Classifier: Topic :: Software", ""),
    ],
)
def test_the_licence_is_that_of_the_expression_else_of_the_classifiers(headers: str, licence: str) -> None:
    assert licence_of(HeaderParser().parsestr(headers)) == licence
