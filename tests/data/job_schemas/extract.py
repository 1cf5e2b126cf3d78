"""How the schemas beside this file were made, in a scratch environment that has the packages named below:

    pip install kubeflow-trainer-api==2.3.0 jsonschema && pip install --no-deps kubeflow-training==1.9.4
    python tests/data/job_schemas/extract.py SKYPILOT_FOLDER     # of an unpacked skypilot-0.14.1 wheel

They hold names, types, enumerations and which fields are required, without descriptions. Sources of volumes, affinity,
probes, init containers and other parts of a pod that no template uses are left out, and so refused as unknown fields.
"""

import ast
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
KUBEFLOW = "PyPI kubeflow-trainer-api 2.3.0, kubeflow/trainer's API trainer.kubeflow.org/v1alpha1 with Kubernetes' pods"
PYTORCH = (
    "PyPI kubeflow-training 1.9.4, kubeflow/training-operator's API kubeflow.org/v1; pods of kubeflow-trainer-api 2.3.0"
)
SKYPILOT = "PyPI skypilot 0.14.1, get_task_schema and _get_single_resources_schema of sky/utils/schemas.py"
POD = "IoK8sApiCoreV1PodTemplateSpec"
KEPT = {
    "IoK8sApiCoreV1PodSpec": "containers volumes restartPolicy terminationGracePeriodSeconds securityContext nodeSelector "
    "tolerations imagePullSecrets serviceAccountName priorityClassName",
    "IoK8sApiCoreV1Container": "name image command args env resources securityContext volumeMounts workingDir ports",
    "IoK8sApiCoreV1Volume": "name emptyDir persistentVolumeClaim hostPath",
    "IoK8sApiCoreV1EnvVarSource": "fieldRef",
    "IoK8sApiCoreV1SecurityContext": "allowPrivilegeEscalation capabilities privileged runAsUser runAsGroup runAsNonRoot",
    "IoK8sApiCoreV1PodSecurityContext": "runAsUser runAsGroup runAsNonRoot fsGroup fsGroupChangePolicy",
    "IoK8sApimachineryPkgApisMetaV1ObjectMeta": "name generateName namespace labels annotations",
    "JobsetV1alpha2JobSetSpec": "failurePolicy replicatedJobs successPolicy suspend ttlSecondsAfterFinished",
    "TrainerV1alpha1TrainJob": "apiVersion kind metadata spec",
    "TrainerV1alpha1TrainJobSpec": "activeDeadlineSeconds managedBy runtimeRef suspend trainer",
    "TrainerV1alpha1MLPolicy": "numNodes torch",
    "TrainerV1alpha1TrainingRuntimeSpec": "mlPolicy template",
}
PYTHON_TYPES = {"str": "string", "int": "integer", "bool": "boolean"}


def plain(node: object) -> object:
    """Without words, and with what is optional either there with its type or absent, as in the resource definitions."""
    if isinstance(node, list):
        return [plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "oneof_schema_1_validator" in node.get(
        "properties", {}
    ):  # a quantity: the resource definitions say int or string
        return {
            "type": ["integer", "string"],
            "pattern": r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$",
        }
    if "anyOf" in node:
        rest = [option for option in node["anyOf"] if option.get("type") != "null"]
        if len(rest) == 1:
            return plain(rest[0])
    kept = {key: value for key, value in node.items() if key not in ("description", "title", "default", "format")}
    if "properties" in kept:
        kept["properties"] = {name: plain(value) for name, value in kept["properties"].items()}
        kept["additionalProperties"] = False
        return kept
    return {key: plain(value) for key, value in kept.items()}


def reduced(definitions: dict, names: list[str]) -> dict:
    """What the named definitions need, each with the fields that are kept."""
    found: dict = {}
    while names:
        name = names.pop()
        if name in found:
            continue
        definition = found[name] = plain(definitions[name])
        if name in KEPT:
            fields = KEPT[name].split()
            definition["properties"] = {field: definition["properties"][field] for field in fields}
        names += [part.split('"')[0] for part in json.dumps(definition).split("#/$defs/")[1:]]
    return dict(sorted(found.items()))


def kubeflow_definitions(models: object, names: list[str]) -> dict:
    collected: dict = {}
    for name in names:
        schema = getattr(models, name).model_json_schema()
        collected |= schema.pop("$defs", {})
        collected[name] = schema
    return collected


def fields_of(model: type, known: dict[str, object]) -> dict:
    """Properties of a model of kubeflow-training, whose types are names."""
    properties = {}
    for name, kind in model.openapi_types.items():
        wire = model.attribute_map[name]
        properties[wire] = known.get(kind) or {"type": PYTHON_TYPES[kind]}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def pytorch_definitions() -> dict:
    from kubeflow.training import models

    run_policy = fields_of(models.KubeflowOrgV1RunPolicy, {"KubeflowOrgV1SchedulingPolicy": {"type": "object"}})
    replica = fields_of(models.KubeflowOrgV1ReplicaSpec, {"V1PodTemplateSpec": {"$ref": f"#/$defs/{POD}"}})
    known = {
        "KubeflowOrgV1ElasticPolicy": {"type": "object"},
        "dict(str, KubeflowOrgV1ReplicaSpec)": {"type": "object", "additionalProperties": {"$ref": "#/$defs/Replica"}},
        "KubeflowOrgV1RunPolicy": {"$ref": "#/$defs/RunPolicy"},
    }
    spec = fields_of(models.KubeflowOrgV1PyTorchJobSpec, known)
    spec["required"] = ["pytorchReplicaSpecs"]
    return {"Replica": replica, "RunPolicy": run_policy, "Spec": spec}


def skypilot_schema(folder: Path) -> dict:
    """The dictionaries that two functions return, as far as they are literals; what is computed may be anything."""
    functions = {
        node.name: node
        for node in ast.walk(ast.parse((folder / "sky" / "utils" / "schemas.py").read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    task = literal(returned(functions["get_task_schema"]))
    resources = literal(returned(functions["_get_single_resources_schema"]))
    task["properties"] = {name: value for name, value in task["properties"].items() if not name.startswith("_")}
    kept = "infra cpus memory accelerators instance_type use_spot job_recovery disk_size network_tier image_id"
    resources["properties"] = {name: resources["properties"][name] for name in kept.split()}
    resources["properties"]["job_recovery"]["anyOf"][1]["additionalProperties"] = False  # as its server has it
    resources["additionalProperties"] = False
    task["properties"]["resources"] = resources
    return task


def returned(function: ast.FunctionDef) -> ast.expr:
    return next(
        node.value for node in reversed(function.body) if isinstance(node, ast.Return) and node.value is not None
    )


def literal(node: ast.expr) -> object:
    if isinstance(node, ast.Dict):
        pairs = [
            (ast.literal_eval(key), literal(value)) for key, value in zip(node.keys, node.values, strict=True) if key
        ]
        return {key: value for key, value in pairs if value is not None and key not in ("$schema", "description")}
    if isinstance(node, ast.List):
        return [literal(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def write(name: str, source: str, schema: dict) -> None:
    content = {"$comment": f"{source}. Made by extract.py beside this file.", **schema}
    (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    import kubeflow_trainer_api.models as models

    kinds = {"train_job": "TrainerV1alpha1TrainJob", "training_runtime": "TrainerV1alpha1TrainingRuntime"}
    for file, kind in kinds.items():
        definitions = reduced(kubeflow_definitions(models, [kind]), [kind])
        write(file, KUBEFLOW, {"$ref": f"#/$defs/{kind}", "$defs": definitions})
    pods = reduced(kubeflow_definitions(models, [POD]), [POD, "IoK8sApimachineryPkgApisMetaV1ObjectMeta"])
    job = {
        "type": "object",
        "properties": {
            "apiVersion": {"const": "kubeflow.org/v1"},
            "kind": {"const": "PyTorchJob"},
            "metadata": {"$ref": "#/$defs/IoK8sApimachineryPkgApisMetaV1ObjectMeta"},
            "spec": {"$ref": "#/$defs/Spec"},
        },
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
    }
    write("pytorch_job", PYTORCH, {**job, "$defs": {**pods, **pytorch_definitions()}})
    write("skypilot_task", SKYPILOT, skypilot_schema(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
