"""Whether a generator finds the learner's log-probs after an update, and whose fault it is when it does not."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np

from rlsys.errors import ModelMismatchError, WeightUpdateError
from rlsys.roles import PublishedWeights

# Largest difference between the learner's log-probs of the probe and the generator's. bfloat16 rounds each layer's
# result to three digits, so there only gross errors (a tensor that was not updated, or in the wrong place) show.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}


def check_probe(
    generator: str, engine: str, weights: PublishedWeights, found: np.ndarray, dtype: str, agreed_before: bool
) -> float:
    """The largest absolute difference between `found`, the generator's log-probs of the probe, and the learner's.

    `engine` says what computed them, such as "vLLM 0.32.0, LlamaForCausalLM"; `agreed_before`: this process has passed
    a probe with earlier weights.

    Past the tolerance of `dtype` one of two things is wrong. Weights whose checksum was right and which are the first
    that the process takes: then the two implementations differ, which a restart does not mend (ModelMismatchError). If
    they agreed before, or the bytes were not checked (`weights.engine: nccl`): the weights did not arrive
    (WeightUpdateError).
    """
    wanted = np.array(weights.probe.logprobs)
    differences = np.abs(found - wanted)
    largest, tolerance = float(differences.max()), TOLERANCE[dtype]
    if largest <= tolerance:
        return largest
    worst = int(np.argmax(differences))  # that of the first NaN, if there is one
    ids = weights.probe.token_ids
    figures = (
        f"by up to {largest:.2e} ({differences.mean():.2e} on average; {tolerance:g} is allowed in {dtype}), most at "
        f"token {worst + 1} of {len(ids)}, id {ids[worst + 1]}: {wanted[worst]:.6g} at the learner, "
        f"{found[worst]:.6g} here"
    )
    checksum = weights.manifest.get("checksum")
    if agreed_before or checksum is None:
        raise WeightUpdateError(
            f"{generator}: with version {weights.version} its log-probs of the probe differ from the learner's "
            f"{figures}: the weights did not arrive as they are",
            kind="probe",
        )
    hints = ["rollout.engine.extra: {model_impl: transformers}", "another attention_backend there"]
    if dtype != "float32":
        hints.insert(0, "model.dtype: float32")
    raise ModelMismatchError(
        f"{generator}: version {weights.version} arrived as it was sent ({checksum}, all "
        f"{len(weights.manifest['tensors'])} tensors), yet its log-probs of the probe differ from the learner's "
        f"{figures}. The learner (transformers {version('transformers')}) and the generator ({engine}) compute this "
        f"model differently; a restart would not change that. Try {', '.join(hints)}, or another version of either.",
        kind="probe",
    )
