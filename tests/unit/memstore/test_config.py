"""Config: settings come from where they should, and what cannot be is named."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from memstore.config import PREFIX, Config, ConfigError, add_flags, from_sources


def parsed(*arguments: str) -> dict[str, str | None]:
    """Flags as the command line gives them."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(arguments))


def test_nobody_says_anything() -> None:
    config = from_sources(parsed(), {"HOME": "/home/x", "PATH": "/bin"})
    assert config == Config(data=Path("~/.local/share/memstore").expanduser())
    assert from_sources(parsed(), {"XDG_DATA_HOME": "/share"}).data == Path("/share/memstore")


def test_a_flag_goes_before_its_variable_before_the_default() -> None:
    environ = {"MEMSTORE_PORT": "1", "MEMSTORE_HOST": "::1"}
    config = from_sources(parsed("--port", "2"), environ)
    assert (config.port, config.host, config.metrics_port) == (2, "::1", 9077)


def test_every_setting_can_be_given_both_ways() -> None:
    texts = {
        int: "1",
        float: "0.5",
        str: "x",
    }
    special = {
        "catalog": "none",
        "device": "cuda:1",
        "reflection": "on",
        "lend": "off",
        "log_format": "json",
        "log_level": "error",
        "tls_cert": "c",
        "tls_key": "k",
        "tls_tenant": "default",
        "insecure_bind": "1",
    }
    environ, flags = {}, []
    for field in dataclasses.fields(Config):
        text = special.get(field.name) or texts.get(type(field.default), "p")
        environ[PREFIX + field.name.upper()] = text
        flag = f"--{field.name.replace('_', '-')}"
        flags += [flag] if field.name == "insecure_bind" else [flag, text]
    assert from_sources(parsed(*flags), {}) == from_sources(parsed(), environ)
    assert from_sources(parsed(), environ).insecure_bind


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("2K", 2048), ("3m", 3 << 20), ("8G", 8 << 30), ("1TiB", 1 << 40), (" 5MB ", 5 << 20)],
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert from_sources(parsed("--capacity", text), {}).capacity == size


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"MEMSTORE_PROT": "1"}, "MEMSTORE_PROT"),
        ({"MEMSTORE_PORT": "http"}, "MEMSTORE_PORT=http: not a whole number"),
        ({"MEMSTORE_PORT": "65536"}, "MEMSTORE_PORT=65536"),
        ({"MEMSTORE_CAPACITY": "8 apples"}, "MEMSTORE_CAPACITY"),
        ({"MEMSTORE_CAPACITY": "-1"}, "MEMSTORE_CAPACITY"),
        ({"MEMSTORE_GRACE": "-1"}, "MEMSTORE_GRACE"),
        ({"MEMSTORE_GRACE": "long"}, "MEMSTORE_GRACE=long: not a number"),
        ({"MEMSTORE_GRACE": "nan"}, "MEMSTORE_GRACE"),
        ({"MEMSTORE_TENANT_RATIO": "2"}, "MEMSTORE_TENANT_RATIO"),
        ({"MEMSTORE_INSECURE_BIND": "maybe"}, "MEMSTORE_INSECURE_BIND"),
        ({"MEMSTORE_LOG_FORMAT": "xml"}, "MEMSTORE_LOG_FORMAT=xml: not one of text, json"),
        ({"MEMSTORE_CATALOG": "redis"}, "--catalog=redis"),
        ({"MEMSTORE_CATALOG": "http://host"}, "--catalog=http://host"),
        ({"MEMSTORE_DEVICE": "tpu"}, "--device=tpu"),
        ({"MEMSTORE_TLS_CERT": "c"}, "--tls-cert and --tls-key"),
        ({"MEMSTORE_TLS_CLIENT_CA": "c"}, "--tls-client-ca"),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_be_is_named(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_sources(parsed(), environ)
    assert named in str(caught.value)


def test_variables_of_the_other_commands_are_passed_over() -> None:
    assert from_sources(parsed(), {"MEMSTORE_TARGET": "host:1"}).port == 7077


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("Yes", True), ("on", True), ("0", False), ("off", False), ("", False)]
)
def test_switches_are_on_or_off(text: str, value: bool) -> None:
    assert from_sources(parsed(), {"MEMSTORE_INSECURE_BIND": text}).insecure_bind is value


def test_every_flag_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    parser.print_help()
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in shown
        assert field.metadata["help"]
