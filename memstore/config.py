"""Config: the server's frozen settings, built once from flags and MEMSTORE_* variables, each named in one place."""

# ruff: noqa: RUF009  `setting` makes a dataclass field

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping

PREFIX = "MEMSTORE_"
CLIENT_VARIABLES = frozenset({"MEMSTORE_TARGET", "MEMSTORE_TLS_ROOT", "MEMSTORE_CLIENT_TOKEN_FILE"})
"""Variables of the other commands, which a server passes over."""

T = TypeVar("T")
_SIZE = re.compile(r"(\d+)([KMGT]?)(i?B)?", re.IGNORECASE)


class ConfigError(Exception):
    """A setting that cannot be; the text names it. Stops the start."""


def size(text: str) -> int:
    """Bytes, as 1048576 or 512M, 8G, 8GiB (powers of 1,024)."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError("not a size such as 8G")
    return int(match[1]) << (10 * " KMGT".index(match[2].upper() or " "))


def switch(text: str) -> bool:
    """1, true, yes, on or 0, false, no, off."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("not one of 1, true, yes, on, 0, false, no, off")


def one_of(*choices: str) -> Callable[[str], str]:
    """One of these words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"not one of {', '.join(choices)}")
        return text

    return parse


def _number(kind: Callable[[str], T], text: str, name: str) -> T:
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"not {name}") from error


def whole(least: int, most: int) -> Callable[[str], int]:
    """A whole number within limits."""

    def parse(text: str) -> int:
        value = _number(int, text, "a whole number")
        if not least <= value <= most:
            raise ValueError(f"outside {least} to {most}")
        return value

    return parse


def real(least: float, most: float) -> Callable[[str], float]:
    """A number within limits."""

    def parse(text: str) -> float:
        value = _number(float, text, "a number")
        if not least <= value <= most:
            raise ValueError(f"outside {least} to {most}")
        return value

    return parse


def path(text: str) -> Path | None:
    """A path; empty for none."""
    return Path(text).expanduser() if text else None


def setting(parse: Callable[[str], T], default: T, explanation: str) -> T:
    """A field of Config: how its text is read, what it is when nobody says, and what it means."""
    return dataclasses.field(default=default, metadata={"parse": parse, "help": explanation})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Every setting of the server: `log_level` is read from --log-level, or else from MEMSTORE_LOG_LEVEL."""

    host: str = setting(str, "127.0.0.1", "address to listen on")
    port: int = setting(whole(0, 65535), 7077, "port to listen on; 0 for any free one")
    unix_socket: Path | None = setting(path, None, "listen on this Unix socket instead of host and port")
    insecure_bind: bool = setting(switch, False, "listen beyond loopback without TLS or tokens")
    token_file: Path | None = setting(path, None, "file of the tokens that are let in; see `memstore token`")
    tls_cert: Path | None = setting(path, None, "PEM certificate chain of the server")
    tls_key: Path | None = setting(path, None, "PEM key of the server")
    tls_client_ca: Path | None = setting(path, None, "PEM certificates that clients must be signed by (mutual TLS)")
    tls_tenant: str = setting(
        one_of("default", "cn"),
        "default",
        "tenant under mutual TLS: cn for the common name in the certificate",
    )
    device: str = setting(str, "auto", "cpu, cuda, cuda:N, or auto for the first GPU if there is one")
    capacity: int = setting(size, 0, "bytes that memories may reserve, such as 8G; 0 for 0.8 of what is free")
    host_capacity: int = setting(
        size, 0, "bytes of host memory that sequences spilled from a GPU may take; 0 for 0.8 of what is free"
    )
    threads: int = setting(whole(0, 1024), 0, "CPU threads of the search; 0 for torch's own choice")
    max_memories: int = setting(whole(1, 1_000_000), 1024, "memories that may exist at once")
    data: Path | None = setting(path, None, "folder of catalogue, logs and snapshots (default ~/.local/share/memstore)")
    disk_quota: int = setting(size, 0, "bytes that durable memories may take there; 0 for as much as the disk has")
    snapshot_interval: float = setting(real(0.1, 86400.0), 600.0, "seconds until a snapshot takes in what the log has")
    catalog: str = setting(str, "file", "where specs are kept: file, none, or a redis:// rediss:// unix:// URL")
    catalog_prefix: str = setting(str, "memstore", "prefix of the keys in Redis; one for each server")
    queue_requests: int = setting(whole(1, 1_000_000), 1024, "requests that may wait for the device")
    queue_bytes: int = setting(size, 256 << 20, "bytes of requests that may wait for the device")
    tenant_bytes: int = setting(size, 0, "bytes that the memories of one tenant may reserve; 0 for no bound")
    tenant_sequences: int = setting(whole(0, 1 << 40), 0, "sequences that they may have places for; 0 for no bound")
    tenant_calls: float = setting(real(0.0, 1e9), 0.0, "calls a second that one tenant may make; 0 for no bound")
    tenant_leases: int = setting(
        whole(0, 256), 0, "leases of mapped memory that one tenant may have; 0 for 64, or no bound without tenants"
    )
    tenant_spilled_bytes: int = setting(size, 0, "bytes that files of its spilled sequences may have; 0 for no bound")
    tenant_ratio: float = setting(real(0.01, 1.0), 1.0, "share of the queue that one tenant may take, 0.01 to 1")
    lend: str = setting(one_of("auto", "off"), "auto", "lend memories to processes of this host and user: auto or off")
    stream_in_flight: int = setting(whole(1, 1024), 16, "steps of one stream that may be under way")
    reply_bytes: int = setting(size, 256 << 20, "bytes of answers that may wait until their callers take them")
    metrics_host: str = setting(str, "127.0.0.1", "address of metrics and probes")
    metrics_port: int = setting(whole(-1, 65535), 9077, "port of metrics and probes; 0 for any free one, -1 for none")
    metrics_memories: int = setting(
        whole(-1, 10_000), -1, "memories with metrics of their own; -1 for 100, or none where there are tenants"
    )
    reflection: str = setting(one_of("auto", "on", "off"), "auto", "gRPC reflection: auto is on for loopback only")
    log_format: str = setting(one_of("text", "json"), "text", "text or json")
    log_level: str = setting(one_of("debug", "info", "warning", "error"), "info", "debug, info, warning or error")
    grace: float = setting(real(0.0, 3600.0), 10.0, "seconds that calls under way get when the server stops")
    ready_file: Path | None = setting(path, None, "write {address, metrics, pid} to this file once serving")


def _fields() -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(Config)}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting; what is not given stays None."""
    for name, field in _fields().items():
        text = field.metadata["help"]
        shown = text if field.default in (None, False) or "(default" in text else f"{text} (default {field.default})"
        flag = f"--{name.replace('_', '-')}"
        if field.metadata["parse"] is switch:
            parser.add_argument(flag, action="store_const", const="1", help=shown)
        else:
            parser.add_argument(flag, metavar=name.rpartition("_")[2].upper(), help=shown)


def from_sources(flags: Mapping[str, str | None], environ: Mapping[str, str]) -> Config:
    """The settings: a flag before its variable before the default. ConfigError names what cannot be read."""
    fields = _fields()
    variables = {name: value for name, value in environ.items() if name.startswith(PREFIX)}
    known = {PREFIX + name.upper(): name for name in fields}
    unknown = sorted(variables.keys() - known.keys() - CLIENT_VARIABLES)
    if unknown:
        raise ConfigError(f"{unknown[0]}: there is no such setting")
    values: dict[str, Any] = {}
    for variable, name in known.items():
        given = flags.get(name)
        source, text = (
            (f"--{name.replace('_', '-')}", given) if given is not None else (variable, variables.get(variable))
        )
        if text is not None:
            values[name] = _parsed(source, text, fields[name].metadata["parse"])
    if values.get("data") is None:
        values["data"] = Path(environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "memstore"
    config = Config(**values)
    _check(config)
    return config


def _parsed(source: str, text: str, parse: Callable[[str], object]) -> object:
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f"{source}={text}: {error}") from error


def _check(config: Config) -> None:
    """What settings demand of each other."""
    if (config.tls_cert is None) != (config.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key belong together")
    if config.tls_client_ca is not None and config.tls_cert is None:
        raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key")
    if config.tls_tenant == "cn" and (config.tls_client_ca is None or config.token_file is not None):
        raise ConfigError("--tls-tenant=cn needs --tls-client-ca, and no --token-file: that names tenants itself")
    if not re.fullmatch(r"file|none|(rediss?|unix)://\S+", config.catalog):
        raise ConfigError(f"--catalog={config.catalog}: file, none, or a redis:// rediss:// unix:// URL")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device):
        raise ConfigError(f"--device={config.device}: auto, cpu, cuda or cuda:N")
