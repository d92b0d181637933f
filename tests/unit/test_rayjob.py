"""rayjob.yaml: fields and types as KubeRay's reference has them, and the promises that a schema cannot hold.

The schema of the published resource definition (1.2 MB, `ray.io_rayjobs.yaml` of ray-project/kuberay) is not kept here.
`FIELDS` are the fields that the manifest may use, written down by hand from the API references of KubeRay and of
Kubernetes. Where `KUBERAY_CRD` names a copy of the published file, the manifest is checked against that, too.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs.caption import command

ROOT = Path(__file__).resolve().parents[2]
CRD = os.environ.get("KUBERAY_CRD")


def record(required: tuple[str, ...] = (), /, **properties: Any) -> dict[str, Any]:
    """An object with these fields and no others: a field that is misspelt is dropped by Kubernetes without a word."""
    return {
        "type": "object",
        "properties": {name.replace("_", "-"): schema for name, schema in properties.items()},
        "required": list(required),
        "additionalProperties": False,
    }


def many(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema}


def words(*allowed: str) -> dict[str, Any]:
    return {"enum": list(allowed)}


TEXT, FLAG, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITY = {"type": "string", "pattern": r"^\d+(\.\d+)?([KMGTPE]i|[numkMGTPE])?$"}
RESOURCES = record(requests={"additionalProperties": QUANTITY}, limits={"additionalProperties": QUANTITY})
CONTAINER_SECURITY = record(
    allowPrivilegeEscalation=FLAG,
    privileged=FLAG,
    capabilities=record(drop=many(TEXT), add=many(TEXT)),
    readOnlyRootFilesystem=FLAG,
)
POD_SECURITY = record(
    runAsNonRoot=FLAG,
    runAsUser=COUNT,
    fsGroup=COUNT,
    seccompProfile=record(("type",), type=words("RuntimeDefault", "Localhost", "Unconfined")),
)
CONTAINER = record(
    ("name", "image"),
    name=TEXT,
    image=TEXT,
    ports=many(record(("containerPort",), name=TEXT, containerPort=COUNT)),
    resources=RESOURCES,
    securityContext=CONTAINER_SECURITY,
    volumeMounts=many(record(("name", "mountPath"), name=TEXT, mountPath=TEXT, readOnly=FLAG)),
)
VOLUME = record(
    ("name",),
    name=TEXT,
    persistentVolumeClaim=record(("claimName",), claimName=TEXT, readOnly=FLAG),
    emptyDir=record(medium=words("", "Memory"), sizeLimit=QUANTITY),
)
TEMPLATE = record(
    spec=record(
        ("containers",),
        restartPolicy=words("Always", "OnFailure", "Never"),
        automountServiceAccountToken=FLAG,
        terminationGracePeriodSeconds=COUNT,
        securityContext=POD_SECURITY,
        containers=many(CONTAINER),
        volumes=many(VOLUME),
    )
)
FIELDS = record(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=record(("name",), name=TEXT, namespace=TEXT, labels=TEXTS),
    spec=record(
        entrypoint=TEXT,
        submissionMode=words("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        backoffLimit=COUNT,
        activeDeadlineSeconds=COUNT,
        rayClusterSpec=record(
            ("headGroupSpec",),
            rayVersion=TEXT,
            authOptions=record(mode=words("disabled", "token"), secretName=TEXT),
            enableInTreeAutoscaling=FLAG,
            autoscalerOptions=record(
                version=words("v1", "v2"),
                upscalingMode=words("Default", "Aggressive", "Conservative"),
                idleTimeoutSeconds=COUNT,
                resources=RESOURCES,
                securityContext=CONTAINER_SECURITY,
            ),
            headGroupSpec=record(
                ("template",),
                rayStartParams=TEXTS,
                serviceType=words("ClusterIP", "NodePort", "LoadBalancer"),
                template=TEMPLATE,
            ),
            workerGroupSpecs=many(
                record(
                    ("groupName", "maxReplicas", "minReplicas", "template"),
                    groupName=TEXT,
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    rayStartParams=TEXTS,
                    template=TEMPLATE,
                )
            ),
        ),
    ),
)


def load() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "rayjob.yaml").read_text())
    return loaded


JOB = load()
CLUSTER = JOB["spec"]["rayClusterSpec"]
HEAD, *WORKERS = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
PODS = [group["template"]["spec"] for group in (HEAD, *WORKERS)]


def test_every_field_is_one_that_kuberay_knows() -> None:
    jsonschema.validate(JOB, FIELDS)


def broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    job = copy.deepcopy(JOB)
    change(job["spec"]["rayClusterSpec"])
    return job


@pytest.mark.parametrize(
    "job",
    [
        broken(lambda c: c.update(enableAutoscaling=True)),
        broken(lambda c: c.update(enableInTreeAutoscaling="yes")),
        broken(lambda c: c["authOptions"].update(mode="tokens")),
        broken(lambda c: c["autoscalerOptions"].update(idleTimeoutSeconds="120")),
        broken(lambda c: c["headGroupSpec"].pop("template")),
        broken(lambda c: c["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0})),
        broken(lambda c: c["workerGroupSpecs"][0].pop("groupName")),
        broken(lambda c: c["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"].update(limit={})),
    ],
)
def test_a_broken_one_is_refused(job: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, FIELDS)


def strict(schema: Any) -> Any:
    """A schema of a resource definition that refuses fields it does not have; Kubernetes itself drops them."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        made.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields", False)))
    return made


def test_a_resource_definition_is_made_strict() -> None:
    inner = {"type": "object", "properties": {"name": {"type": "string"}}}
    schema = strict({"type": "object", "properties": {"spec": inner, "metadata": {"type": "object"}}})
    jsonschema.validate({"spec": {"name": "x"}, "metadata": {"anything": 1}}, schema)
    with pytest.raises(jsonschema.ValidationError, match="nmae"):
        jsonschema.validate({"spec": {"nmae": "x"}}, schema)


@pytest.mark.skipif(CRD is None, reason="KUBERAY_CRD does not name a copy of KubeRay's ray.io_rayjobs.yaml")
def test_the_published_definition_accepts_it() -> None:
    assert CRD is not None
    definition = yaml.safe_load(Path(CRD).read_text())
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    jsonschema.validate(JOB, strict(version["schema"]["openAPIV3Schema"]))


def test_no_pod_has_rights_that_it_does_not_need() -> None:
    for pod in PODS:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert not any("hostPath" in volume for volume in pod["volumes"])
    contexts = [container["securityContext"] for pod in PODS for container in pod["containers"]]
    for context in [*contexts, CLUSTER["autoscalerOptions"]["securityContext"]]:
        assert context["privileged"] is False
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
    for pod in PODS[1:]:
        assert pod["automountServiceAccountToken"] is False, "only the head's autoscaler talks to Kubernetes"


def test_every_container_is_limited_and_all_share_a_volume() -> None:
    resources = [container["resources"] for pod in PODS for container in pod["containers"]]
    for each in [*resources, CLUSTER["autoscalerOptions"]["resources"]]:
        assert {"cpu", "memory"} <= each["limits"].keys()
        assert each["requests"] == each["limits"]
    for pod in PODS:
        claims = {
            volume["name"]: volume["persistentVolumeClaim"] for volume in pod["volumes"] if "emptyDir" not in volume
        }
        (name,) = claims
        for container in pod["containers"]:
            assert {"name": name, "mountPath": "/shared"} in container["volumeMounts"]
    assert len({json.dumps(pod["volumes"]) for pod in PODS}) == 1


def test_it_grows_wants_a_token_and_stops_gently() -> None:
    assert CLUSTER["authOptions"] == {"mode": "token", "secretName": "ray-ministral-token"}
    assert CLUSTER["enableInTreeAutoscaling"] is True
    assert HEAD["rayStartParams"]["num-cpus"] == "0", "no stage on the head"
    assert HEAD["serviceType"] == "ClusterIP"
    for group in WORKERS:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["minReplicas"] == 0 < group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        assert int(container["resources"]["limits"]["nvidia.com/gpu"]) >= 1
    for pod in PODS:
        assert pod["restartPolicy"] == "Never"
        assert pod["terminationGracePeriodSeconds"] >= 60
    assert JOB["spec"]["shutdownAfterJobFinishes"] is True


def options_of(entrypoint: str) -> Iterator[str]:
    yield from re.findall(r" (--[a-z-]+)", entrypoint)


def test_the_entrypoint_is_a_command_of_ours_on_the_volume() -> None:
    entrypoint = JOB["spec"]["entrypoint"]
    known = {name for option in command.params for name in option.opts}
    assert set(options_of(entrypoint)) <= known
    assert entrypoint.startswith("python /app/jobs/caption.py ")
    assert "--device cuda" in entrypoint, "at the start there is no GPU, and auto would take the CPU"
    for option in ("model", "input", "output"):
        assert f"--{option} /shared/" in entrypoint


def test_ray_is_the_locked_one() -> None:
    (locked,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert CLUSTER["rayVersion"] == locked
