"""Which tensors a model takes, so that a manifest of another model is refused before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.errors import WeightUpdateError


@dataclass(frozen=True, slots=True)
class ExpectedTensors:
    """Shapes by Hugging Face name: `required` each once, `optional` are second names of tied ones."""

    required: Mapping[str, tuple[int, ...]]
    optional: Mapping[str, tuple[int, ...]]

    @staticmethod
    def of(model_path: str | Path) -> ExpectedTensors:
        """Those of the causal language model in a folder (or of a hub name); no memory is taken for them."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(model_path)))
        required = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        every = {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
        return ExpectedTensors(required, {name: shape for name, shape in every.items() if name not in required})

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Raise WeightUpdateError for a tensor that is missing, unknown, or of another shape."""
        version = manifest["version"]
        shapes = {entry["name"]: tuple(entry["shape"]) for entry in manifest["tensors"]}
        if missing := sorted(set(self.required) - set(shapes)):
            message = f"weights of version {version} lack {len(missing)} tensors, such as {missing[0]}"
            raise WeightUpdateError(message, kind="tensors")
        for name, shape in shapes.items():
            wanted = self.required.get(name, self.optional.get(name))
            if wanted is None:
                message = f"weights of version {version}: the model has no tensor {name}"
                raise WeightUpdateError(message, kind="tensors")
            if shape != wanted:
                raise WeightUpdateError(
                    f"weights of version {version}: {name} has shape {list(shape)}, the model's is {list(wanted)}",
                    kind="tensors",
                )
