"""The container file and the manifests: read, not run. The schema knows the fields used here and refuses all others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
import yaml

from cairnd.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
SIDECAR = DEPLOY / "kubernetes" / "sidecar.yaml"
POD_SCHEMA: dict[str, Any] = json.loads((Path(__file__).parent / "pod.schema.json").read_text())


@pytest.fixture
def pod() -> dict[str, Any]:
    """The sidecar manifest."""
    (document,) = yaml.safe_load_all(SIDECAR.read_text())
    unshared = json.loads(json.dumps(document))  # YAML aliases are one object in two places: damage would spread
    assert isinstance(unshared, dict)
    return unshared


def complaints(document: dict[str, Any]) -> list[str]:
    """What the schema has against a manifest."""
    jsonschema.Draft202012Validator.check_schema(POD_SCHEMA)
    errors = jsonschema.Draft202012Validator(POD_SCHEMA).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in errors]


def test_the_sidecar_fits_the_schema(pod: dict[str, Any]) -> None:
    assert not complaints(pod)


def sidecar(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["spec"]["initContainers"]
    assert isinstance(container, dict)
    return container


@pytest.mark.parametrize(
    "damage",
    [
        lambda pod: pod["spec"].update(hostNetwork=True),
        lambda pod: pod["spec"].update(hostPID=True),
        lambda pod: pod["spec"].pop("automountServiceAccountToken"),
        lambda pod: pod["spec"]["securityContext"].update(runAsNonRoot=False),
        lambda pod: pod["spec"]["securityContext"].update(runAsUser=0),
        lambda pod: pod["spec"]["securityContext"]["seccompProfile"].update(type="Unconfined"),
        lambda pod: pod["spec"]["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
        lambda pod: pod["spec"]["volumes"][0]["emptyDir"].pop("sizeLimit"),
        lambda pod: sidecar(pod).pop("restartPolicy"),
        lambda pod: sidecar(pod)["securityContext"].update(privileged=True),
        lambda pod: sidecar(pod)["securityContext"].update(allowPrivilegeEscalation=True),
        lambda pod: sidecar(pod)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
        lambda pod: sidecar(pod)["securityContext"].pop("readOnlyRootFilesystem"),
        lambda pod: sidecar(pod)["resources"]["limits"].pop("ephemeral-storage"),
        lambda pod: sidecar(pod).pop("startupProbe"),
        lambda pod: sidecar(pod)["env"][3].update(value=17179869184),
        lambda pod: sidecar(pod)["volumeMounts"][0].update(mountpath="/x"),
    ],
)
def test_a_loosened_manifest_is_found(pod: dict[str, Any], damage: Callable[[dict[str, Any]], object]) -> None:
    damage(pod)
    assert complaints(pod)


def test_volumes_and_mounts_match(pod: dict[str, Any]) -> None:
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    containers = [*pod["spec"]["initContainers"], *pod["spec"]["containers"]]
    mounted = {mount["name"] for container in containers for mount in container["volumeMounts"]}
    assert mounted == volumes


def test_trainer_and_daemon_meet_at_the_socket(pod: dict[str, Any]) -> None:
    (trainer,) = pod["spec"]["containers"]
    for container in (sidecar(pod), trainer):
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert mounts[environment["CAIRN_RUNTIME_DIR"]] == "cairn-socket"


def test_the_sidecar_uses_settings_that_exist(pod: dict[str, Any]) -> None:
    known = {f"CAIRN_{name.upper()}" for name in Settings.__dataclass_fields__}
    environment = {variable["name"]: variable["value"] for variable in sidecar(pod)["env"]}
    assert {name for name in environment if name.startswith("CAIRN_")} <= known
    memory_limit = int(sidecar(pod)["resources"]["limits"]["memory"].removesuffix("Gi")) * 1024**3
    assert memory_limit >= int(environment["CAIRN_CAPTURE_MEMORY_BYTES"]) + 256 * 1024**2
    assert pod["spec"]["terminationGracePeriodSeconds"] > Settings().drain_timeout_s


class Instruction(NamedTuple):
    """One instruction of a container file, its continuation lines joined."""

    name: str
    value: str


KNOWN_INSTRUCTIONS = {
    *("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "STOPSIGNAL", "USER"),
    *("VOLUME", "WORKDIR"),
}


def stages(text: str) -> list[list[Instruction]]:
    """The instructions of each build stage; raises ValueError for a line that is none."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found: list[list[Instruction]] = []
    for joined in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, value = joined.partition(" ")
        if name not in KNOWN_INSTRUCTIONS:
            raise ValueError(f"not an instruction: {joined}")
        if name == "FROM":
            found.append([])
        found[-1].append(Instruction(name, " ".join(value.split())))
    return found


@pytest.fixture
def image() -> list[list[Instruction]]:
    """The stages of the daemon's image."""
    return stages((DEPLOY / "Dockerfile").read_text())


def values(stage: list[Instruction], name: str) -> list[str]:
    return [instruction.value for instruction in stage if instruction.name == name]


def test_a_line_that_is_no_instruction_is_found() -> None:
    with pytest.raises(ValueError, match="not an instruction"):
        stages("FROM python:3.11\nRUNN true\n")


def test_base_images_are_named_by_version(image: list[list[Instruction]]) -> None:
    for stage in image:
        (base,) = values(stage, "FROM")
        assert re.fullmatch(r"python:3\.\d+-slim-\w+( AS \w+)?", base)


def test_the_image_does_not_run_as_root(image: list[list[Instruction]]) -> None:
    user, group = values(image[-1], "USER")[-1].split(":")
    assert int(user) > 0
    assert int(group) > 0
    assert f"UID={user}" in values(image[-1], "ARG")
    names = [instruction.name for instruction in image[-1]]
    assert "RUN" not in names[names.index("USER") :]


def test_what_is_copied_exists(image: list[list[Instruction]]) -> None:
    built = {base.split(" AS ")[1] for stage in image for base in values(stage, "FROM") if " AS " in base}
    for stage in image:
        for value in values(stage, "COPY"):
            *copied, _ = value.split()
            if copied[0].startswith("--from="):
                assert copied[0].removeprefix("--from=") in built
            else:
                assert all((REPOSITORY / name).exists() for name in copied), value


def test_the_image_is_the_daemon_without_torch(image: list[list[Instruction]]) -> None:
    assert json.loads(values(image[-1], "ENTRYPOINT")[0]) == ["cairnd"]
    installs = " ".join(value for stage in image for value in values(stage, "RUN"))
    assert ".[daemon]" in installs
    assert "torch" not in installs
    assert "deepspeed" not in installs


def test_unverified_things_say_so() -> None:
    for path in (DEPLOY / "Dockerfile", SIDECAR):
        assert "UNVERIFIED" in path.read_text()
