"""Make kuberay_schema.json of KubeRay: `python tests/launch/reduce_crds.py VERSION RAYCLUSTERS.yaml RAYJOBS.yaml`.

The CRDs are 2.3 MB because every pod template is written out wherever one can be, with its documentation. Here each
distinct part is there once, without documentation, and nothing else is left out. Fields that are not in the schema are
refused, as `kubectl apply` does.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

SHARED_FROM = 120  # characters: shorter parts are written out


def strict(part: Any) -> Any:
    """As JSON schema, without documentation, every object closed that lists its properties."""
    if isinstance(part, list):
        return [strict(item) for item in part]
    if not isinstance(part, dict):
        return part
    kept = {
        key: {name: strict(value) for name, value in item.items()} if key == "properties" else strict(item)
        for key, item in part.items()
        if key not in ("description", "default", "format") and not key.startswith("x-kubernetes-")
    }
    if part.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    open_ended = part.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in part
    return {**kept, "additionalProperties": False} if "properties" in part and not open_ended else kept


def text_of(part: Any) -> str:
    return json.dumps(part, sort_keys=True, separators=(",", ":"))


class Sharer:
    """Writes each distinct schema that is there more than once under `$defs`."""

    def __init__(self, roots: list[Any]) -> None:
        self._seen: Counter[str] = Counter()
        self.defs: dict[str, Any] = {}
        for root in roots:
            self._count(root)

    def _count(self, part: Any) -> None:
        text = text_of(part)
        if isinstance(part, dict):
            self._seen[text] += 1
        if not isinstance(part, dict) or self._seen[text] == 1:  # what is below a part that is shared is there once
            for item in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
                self._count(item)

    def share(self, part: Any) -> Any:
        if isinstance(part, list):
            return [self.share(item) for item in part]
        if not isinstance(part, dict):
            return part
        text = text_of(part)
        if "type" not in part or not isinstance(part["type"], str | list) or len(text) < SHARED_FROM:
            return {key: self.share(item) for key, item in part.items()}
        if self._seen[text] == 1:
            return {key: self.share(item) for key, item in part.items()}
        name = hashlib.sha256(text.encode()).hexdigest()[:8]
        if name not in self.defs:
            self.defs[name] = {key: self.share(item) for key, item in part.items()}
        return {"$ref": f"#/$defs/{name}"}


def main(version: str, *paths: str) -> None:
    kinds = {}
    for path in paths:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        [v1] = [item for item in content["spec"]["versions"] if item["name"] == "v1"]
        schema = strict(v1["schema"]["openAPIV3Schema"])
        schema["properties"].pop("status", None)  # the operator's
        schema["properties"]["metadata"] = {
            "type": "object",
            "required": ["name"],
            "additionalProperties": False,
            "properties": {
                **{name: {"type": "string"} for name in ("name", "namespace")},
                **{
                    name: {"type": "object", "additionalProperties": {"type": "string"}}
                    for name in ("labels", "annotations")
                },
            },
        }
        kinds[content["spec"]["names"]["kind"]] = {**schema, "required": ["apiVersion", "kind", "metadata", "spec"]}
    sharer = Sharer(list(kinds.values()))
    shared = {kind: sharer.share(schema) for kind, schema in kinds.items()}
    source = {
        "source": "github.com/ray-project/kuberay, helm-chart/kuberay-operator/crds (Apache 2.0)",
        "version": version,
        "made by": "tests/launch/reduce_crds.py",
    }
    out = Path(__file__).with_name("kuberay_schema.json")
    lines = [f'"{name}":{text_of(part)}' for name, part in sorted(sharer.defs.items())]
    kinds_text = ",\n".join(f'"{kind}":{text_of(schema)}' for kind, schema in shared.items())
    defs = ",\n".join(lines)
    out.write_text(f'{{"$comment":{text_of(source)},\n"kinds":{{\n{kinds_text}\n}},\n"$defs":{{\n{defs}\n}}}}\n')
    print(f"{out.name}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
