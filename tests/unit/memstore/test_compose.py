"""The image and the composition: what they name exists, and what they run parses."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from integration.demo.command import _parse as parse_demo
from memstore import config, console
from memstore.auth import check_bind

ROOT = Path(__file__).resolve().parents[3]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IGNORED = (ROOT / ".dockerignore").read_text().split()


def instructions(name: str) -> list[str]:
    """The arguments of each instruction of that name in the Dockerfile."""
    return re.findall(rf"^{name} (.*)$", DOCKERFILE, re.MULTILINE)


def check_command(command: list[str], environment: dict[str, str]) -> None:
    """Fails where a command of ours has flags or settings that do not exist."""
    if command[0] == "demo":
        parse_demo(command[1:])
        return
    parser = argparse.ArgumentParser(exit_on_error=False)
    commands = parser.add_subparsers(dest="command", required=True)
    config.add_flags(commands.add_parser("serve"))
    console.add_commands(commands)
    options = parser.parse_args(command)
    if options.command == "serve":
        check_bind(config.from_sources(vars(options), environment))


def environment_of_image() -> dict[str, str]:
    """What the image's ENV sets."""
    return dict(pair.split("=", 1) for line in instructions("ENV") for pair in shlex.split(line))


def test_the_image_is_made_of_what_is_here_and_reaches_the_builder() -> None:
    sources = [path for line in instructions("COPY") if "--from" not in line for path in line.split()[:-1]]
    assert {"pyproject.toml", "constraints.txt", "memstore", "model_client", "integration"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in IGNORED, source
    assert IGNORED[0] == "*"
    for name in (PROJECT["readme"], *PROJECT["license-files"]):
        assert name in sources


def test_the_image_runs_our_command_as_nobody_in_particular() -> None:
    (entrypoint,) = instructions("ENTRYPOINT")
    (command,) = [yaml.safe_load(line) for line in instructions("CMD")]
    assert yaml.safe_load(entrypoint) == ["memstore"]
    assert "memstore" in PROJECT["scripts"]
    assert instructions("USER") == ["10001"]
    environment = {name: value for name, value in environment_of_image().items() if name.startswith("MEMSTORE_")}
    check_command(command, environment)
    (health,) = instructions("HEALTHCHECK")
    program, *arguments = yaml.safe_load(health.partition("CMD ")[2])
    assert program == "memstore"
    check_command(arguments, {})


def test_every_base_has_a_version() -> None:
    bases = [line.split()[0] for line in instructions("FROM")]
    assert bases == ["python:3.12-slim", "python:3.12-slim"]
    assert instructions("ARG")[0] == "EXTRA=cpu"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_hardened_and_pinned(name: str) -> None:
    service = SERVICES[name]
    tag = service["image"].partition(":")[2]
    assert tag
    assert tag != "latest"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["mem_limit"]
    assert service["profiles"]
    assert "healthcheck" in service
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), port
    for volume in service["volumes"]:
        assert volume.split(":")[0] in COMPOSE["volumes"]
    for network in service.get("networks", []):
        assert network in COMPOSE["networks"]
    for other in service.get("depends_on", {}):
        assert other in SERVICES


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if "build" in service])
def test_what_is_built_is_known_and_what_it_runs_parses(name: str) -> None:
    service = SERVICES[name]
    assert (ROOT / service["build"]["context"] / "Dockerfile").exists()
    arguments = service["build"]["args"]
    assert set(arguments) <= {line.partition("=")[0] for line in instructions("ARG")}
    assert set(arguments["EXTRA"].split(",")) <= set(PROJECT["optional-dependencies"])
    environment = {key: value for key, value in service["environment"].items() if key.startswith("MEMSTORE_")}
    check_command(service["command"], environment)
    if "test" in service["healthcheck"]:
        assert service["healthcheck"]["test"][:2] == ["CMD", "memstore"]
        check_command(service["healthcheck"]["test"][2:], {})


@pytest.mark.parametrize("name", ["memstore", "memstore-gpu"])
def test_a_server_listens_where_its_clients_look(name: str) -> None:
    service = SERVICES[name]
    socket = next(flag.partition("=")[2] for flag in service["command"] if flag.startswith("--unix-socket"))
    target = f"unix://{socket}"
    assert service["environment"]["MEMSTORE_TARGET"] == target
    assert f"--target={target}" in SERVICES["demo"]["command"]
    mount = str(Path(socket).parent)
    assert f"socket:{mount}" in service["volumes"]
    assert f"socket:{mount}" in SERVICES["demo"]["volumes"]
    assert re.search(rf"mkdir -p [^&]*{mount}\b", DOCKERFILE)
    grace = float(next(flag.partition("=")[2] for flag in service["command"] if flag.startswith("--grace")))
    assert float(service["stop_grace_period"].removesuffix("s")) > grace


def test_compiled_code_is_kept_where_a_container_may_write() -> None:
    """A server that compiles at every start is not ready before its probes give up."""
    environment, (data,) = environment_of_image(), instructions("VOLUME")
    for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR"):
        assert environment[name].startswith(f"{data}/")
    report = next(volume.partition(":")[2] for volume in SERVICES["demo"]["volumes"] if volume.startswith("demo-"))
    assert SERVICES["demo"]["environment"]["XDG_CACHE_HOME"].startswith(f"{report}/")


def test_the_catalogue_is_reached_by_the_server_alone() -> None:
    valkey = SERVICES["valkey"]
    assert "ports" not in valkey
    assert COMPOSE["networks"]["catalog"]["internal"] is True
    assert {name for name, service in SERVICES.items() if "catalog" in service.get("networks", [])} == {
        "memstore",
        "memstore-gpu",
        "valkey",
    }
    for name in ("memstore", "memstore-gpu"):
        url = next(flag.partition("=")[2] for flag in SERVICES[name]["command"] if flag.startswith("--catalog="))
        assert url == "redis://valkey:6379/0"
        assert SERVICES[name]["depends_on"]["valkey"]["condition"] == "service_healthy"


def test_the_profiles_differ_in_their_device() -> None:
    assert SERVICES["memstore"]["profiles"] == ["cpu"]
    assert SERVICES["memstore-gpu"]["profiles"] == ["gpu"]
    (device,) = SERVICES["memstore-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert "deploy" not in SERVICES["memstore"]


def _has_compose() -> bool:
    docker = shutil.which("docker")
    return docker is not None and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0


@pytest.mark.skipif(not _has_compose(), reason="docker compose is not installed")
@pytest.mark.parametrize("profile", ["cpu", "gpu", "demo"])
def test_docker_compose_takes_it(profile: str) -> None:
    command = ["docker", "compose", "--profile", profile, "config", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
