"""Cuts KubeRay's definition of a RayJob down to what the manifests in jobs/kuberay/ use.

    python tests/kuberay_schema.py ray.io_rayjobs.yaml VERSION > tests/kuberay_schema.json

The definition is of more than a megabyte: of it are kept the names of all fields beside those that
a manifest has, and everything that is said about these. Run it again when a manifest has new ones:
what a manifest may contain is otherwise refused as unknown one level below.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

MANIFESTS = ("cpu.yaml", "gpu.yaml")
FOLDER = Path(__file__).resolve().parent.parent / "jobs" / "kuberay"
KEPT = ("type", "enum", "format", "minimum", "maximum", "pattern", "required", "anyOf")


def trimmed(schema: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """The part of a schema that says something about these values."""
    kept = {key: schema[key] for key in KEPT if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        kept["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    properties = schema.get("properties", {})
    if properties:
        kept["properties"] = {}
        for name in sorted(properties):
            found = [value[name] for value in values if isinstance(value, dict) and name in value]
            kept["properties"][name] = trimmed(properties[name], found) if found else {}
        kept["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        below = [one for value in values for one in value.values()]
        kept["additionalProperties"] = trimmed(schema["additionalProperties"], below)
    if "items" in schema:
        kept["items"] = trimmed(schema["items"], [one for value in values for one in value])
    return kept


def main() -> None:
    crd = yaml.safe_load(Path(sys.argv[1]).read_text("utf-8"))
    (schema,) = (
        version["schema"]["openAPIV3Schema"]
        for version in crd["spec"]["versions"]
        if version["name"] == "v1"
    )
    manifests = [yaml.safe_load((FOLDER / name).read_text("utf-8")) for name in MANIFESTS]
    source = (
        f"github.com/ray-project/kuberay {sys.argv[2]}, "
        "helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml, Apache-2.0; tests/kuberay_schema.py"
    )
    cut = {"$comment": source, **trimmed(schema, manifests)}
    cut["properties"]["metadata"] = {"type": "object", "required": ["name"]}  # Kubernetes' own
    print(json.dumps(cut, indent=1))


if __name__ == "__main__":
    main()
