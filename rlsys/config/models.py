"""The configuration of a run: strict models, so that an unknown or misspelt key is an error.

Every key a user can write is here, with its default, unit and range. Parts of an algorithm (`algorithm.loss` and so on)
are named and take the options of their own class; they are checked when the algorithm is composed (`rlsys plan` does
that).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class RunConfig(Strict):
    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$", description="Name of the run, also in W&B.")
    dir: str = Field("runs/{name}", description="Where everything goes; `{name}` is replaced by the name.")
    storage: str | None = Field(
        None,
        pattern=r"^[a-z0-9+.]+://.+",
        description="URL, such as s3://bucket/runs/{name}: the run is kept there, and run.dir is a working copy on the "
        "driver's node. null: run.dir is the run, and all nodes see it.",
    )
    storage_timeout_s: PositiveFloat = Field(600.0, description="storage: one file must be sent or fetched by then.")
    seed: NonNegativeInt = 0
    steps: PositiveInt = Field(100, description="Optimizer batches to train on: each makes one weight version.")
    resume: Literal["auto", "never"] = Field(
        "auto",
        description="auto: go on from the newest valid checkpoint in the run directory. never: refuse to reuse it.",
    )


# ---- model --------------------------------------------------------------------------------------------------------


class WarmStartConfig(Strict):
    """Supervised steps on noisy worked sums that give the tiny model something to improve on."""

    steps: NonNegativeInt = 250
    batch_size: PositiveInt = 128
    learning_rate: PositiveFloat = 3e-3
    wrong_step: Fraction = Field(0.35, description="Probability that one running sum of a demonstration is wrong.")
    seed: NonNegativeInt = 0


class TinyModelConfig(Strict):
    """A character-level Qwen3 built from scratch and saved as an ordinary Hugging Face checkpoint."""

    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 384
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    key_value_heads: PositiveInt = 2
    head_dim: PositiveInt = 32
    cache_dir: str = Field("cache/models", description="Built models are kept here, by the hash of their config.")
    warm_start: WarmStartConfig = WarmStartConfig()


class ModelConfig(Strict):
    """Either `path` (a folder in Hugging Face format, a hub name, or the URL of such a folder) or `tiny`."""

    path: str | None = None
    tiny: TinyModelConfig | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_length: PositiveInt = Field(1024, description="Prompt and response together, in tokens.")


# ---- prompts ------------------------------------------------------------------------------------------------------


class SumsSource(Strict):
    """Built-in task: add a few numbers step by step. Unlimited fresh problems, unless there is a limit."""

    kind: Literal["sums"]
    task: str = "sums"
    terms: tuple[PositiveInt, PositiveInt] = Field((3, 5), description="Fewest and most terms.")
    largest: PositiveInt = Field(99, description="Largest term.")
    seed: NonNegativeInt = Field(0, description="Which of the endless sequences of problems.")
    held_out: bool = Field(False, description="Draw from the fifth of all problems that is in no other sequence.")
    limit: PositiveInt | None = Field(None, description="Only so many problems, which then come again.")


class JsonlSource(Strict):
    """One JSON object a line."""

    kind: Literal["jsonl"]
    path: str
    task: str = "default"
    prompt_key: str = Field("prompt", description="Text, or a list of chat messages.")
    answer_key: str | None = Field("answer", description="Reference answer; null when rewards need none.")
    demonstration_key: str | None = Field(None, description="A good response, for algorithms that learn from one.")
    metadata_keys: tuple[str, ...] = ()
    limit: PositiveInt | None = Field(None, description="Only the first rows.")


class HuggingFaceSource(Strict):
    """A data set of the Hugging Face hub, or a local folder or file that `datasets` loads."""

    kind: Literal["huggingface"]
    path: str
    subset: str | None = None
    split: str = "train"
    task: str = "default"
    prompt_key: str = "prompt"
    answer_key: str | None = "answer"
    demonstration_key: str | None = None
    metadata_keys: tuple[str, ...] = ()
    limit: PositiveInt | None = None


class ReasoningGymSource(Strict):
    """A procedural task of the reasoning-gym library, by name and with its own parameters."""

    kind: Literal["reasoning_gym"]
    dataset: str
    size: PositiveInt = 1000
    seed: NonNegativeInt = 0
    task: str = "reasoning_gym"
    parameters: dict[str, Any] = {}


PromptSource = Annotated[SumsSource | JsonlSource | HuggingFaceSource | ReasoningGymSource, Field(discriminator="kind")]


class PromptsConfig(Strict):
    train: PromptSource
    eval: PromptSource | None = None
    system_prompt: str | None = Field(None, description="Put before chat messages that have no system message.")
    instruction: str | None = Field(None, description="A last line added to the text of every prompt.")
    chat_template: Literal["auto", "always", "never"] = Field(
        "auto", description="auto: apply the tokenizer's chat template when it has one."
    )
    shuffle: bool = True
    too_long: Literal["error", "skip"] = Field(
        "error", description="A prompt that leaves no room for rollout.max_new_tokens: stop, or leave it out."
    )


# ---- rollouts -----------------------------------------------------------------------------------------------------


class EngineConfig(Strict):
    """vLLM's own settings. `extra` is passed to vLLM's engine arguments as it is."""

    kv_cache_gib: PositiveFloat = Field(0.25, description="KV cache of one generator on the CPU profile, GiB.")
    gpu_memory_utilization: Fraction = Field(0.85, description="GPU profile only.")
    tensor_parallel: PositiveInt = Field(1, description="GPU profile only.")
    max_num_seqs: PositiveInt = 256
    threads: PositiveInt | None = Field(
        None, description="CPU profile: threads of one engine; null: half the cores, shared among the generators."
    )
    extra: dict[str, Any] = {}


class RolloutConfig(Strict):
    generators: PositiveInt = Field(1, description="Engine workers.")
    samples_per_prompt: NonNegativeInt = Field(8, description="0: none, for algorithms that learn from demonstrations.")
    max_new_tokens: PositiveInt = 64
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int = Field(-1, ge=-1, description="-1: no limit.")
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    engine: EngineConfig = EngineConfig()
    start_timeout_s: PositiveFloat = Field(300.0, description="A generator must be ready by then.")
    stall_timeout_s: PositiveFloat = Field(
        60.0, description="A generator whose tokens do not advance for so long loses its work and is restarted."
    )
    attempts: PositiveInt = Field(3, description="Tries of one prompt before it is dropped.")
    on_refused: Literal["retry", "stop"] = Field(
        "retry",
        description="Rollouts that cannot be right (log-probs, shapes, versions, copies): try again, or stop the run.",
    )


# ---- rewards ------------------------------------------------------------------------------------------------------


class RewardFunctionConfig(Strict):
    """One reward function. The score of a rollout is the weighted sum over the functions that apply to its task."""

    name: str
    kind: Literal["sums", "math_verify", "reasoning_gym", "python"]
    weight: float = 1.0
    tasks: tuple[str, ...] | None = Field(None, description="Only prompts of these tasks; null: all.")
    path: str | None = Field(None, description="python: `module:function` or `file.py:function`.")
    options: dict[str, Any] = Field({}, description="Keyword arguments of the function.")
    range: tuple[float, float] | None = Field(
        None, description="Lowest and highest score it may return; another one is a failure. null: any number."
    )

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.range is not None and self.range[0] > self.range[1]:
            raise ValueError(f"range {list(self.range)} has its lowest score last")
        return self


class RewardsConfig(Strict):
    functions: tuple[RewardFunctionConfig, ...] = Field(min_length=1)
    workers: PositiveInt = 1
    timeout_s: PositiveFloat = Field(
        10.0, description="For one function on one rollout; past it the process that runs it is killed."
    )
    start_timeout_s: PositiveFloat = Field(60.0, description="The functions must be imported by then.")
    concurrency: PositiveInt = Field(16, description="Async functions: calls at once of one worker.")
    on_failure: Literal["mask", "stop"] = Field(
        "mask",
        description="A reward that raised, timed out or is no score (see range): mask that rollout, or stop the run.",
    )
    secrets: tuple[str, ...] = Field(
        (), description="Variables with keys, such as JUDGE_API_KEY, that the functions may see; they see no others."
    )


# ---- reference ----------------------------------------------------------------------------------------------------


class ReferenceConfig(Strict):
    """Started only when the algorithm needs reference log-probs."""

    path: str | None = Field(None, description="null: the initial model.")
    average_with: str | None = Field(None, description="A second model: the reference is the average of both weights.")
    weight: Fraction = Field(0.5, description="average_with: the share of the first model.")
    update: Literal["frozen", "every", "moving_average"] = Field(
        "frozen", description="every: become the policy. moving_average: go a step towards it."
    )
    every: PositiveInt = Field(1, description="update: steps from one update to the next.")
    decay: Fraction = Field(0.99, description="moving_average: what is kept of the reference at each update.")
    micro_batch_tokens: PositiveInt = Field(16384, description="Tokens in one forward pass, padding included.")
    threads: PositiveInt | None = Field(None, description="CPU threads of the server; null: 1.")
    start_timeout_s: PositiveFloat = Field(300.0, description="The server must have loaded its model by then.")


# ---- algorithm ----------------------------------------------------------------------------------------------------


class PartConfig(BaseModel):
    """A named part and its options, which the part's own class checks."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str | None = Field(None, description="null: the preset's part, with the options given here changed.")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class CriticConfig(Strict):
    learning_rate: PositiveFloat = 1e-4
    warmup_steps: NonNegativeInt = 0
    value_clip: PositiveFloat | None = Field(0.2, description="null: no clipping of the value loss.")
    hold_policy_steps: NonNegativeInt = Field(0, description="First steps that train the critic only.")


class AlgorithmConfig(Strict):
    """A preset, and what is to differ from it. A field left out has the preset's value."""

    preset: str = "grpo"
    curriculum: PartConfig | None = Field(None, description="Which prompts come next, and how often each is sampled.")
    rollout: PartConfig | None = Field(None, description="How a prompt is sampled: plain, chain, tree.")
    partition: PartConfig | None = Field(None, description="Where a chain is cut.")
    combine: PartConfig | None = Field(None, description="One signal out of several reward components.")
    advantage: PartConfig | None = None
    adjust: tuple[PartConfig, ...] | None = Field(None, description="Changes of the advantages, in this order.")
    filter: tuple[PartConfig, ...] | None = None
    loss: PartConfig | None = None
    correction: PartConfig | None = Field(None, description="Off-policy weight: none, truncated importance, ...")
    regularize: tuple[PartConfig, ...] | None = None
    aggregate: PartConfig | None = None
    epochs: PositiveInt | None = Field(None, description="Passes over each batch.")
    minibatches: PositiveInt | None = Field(None, description="Optimizer updates per pass.")
    critic: CriticConfig | None = None


# ---- learner ------------------------------------------------------------------------------------------------------


class OptimizerConfig(Strict):
    learning_rate: PositiveFloat = 1e-6
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    final_fraction: Fraction = Field(0.0, description="linear, cosine: the last learning rate over the first.")
    max_grad_norm: PositiveFloat = 1.0


class LearnerConfig(Strict):
    ranks: PositiveInt = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: bool = Field(False, description="Keep optimizer state in host memory (ZeRO 2 and 3, GPU profile).")
    packing: Literal["auto", "padded", "packed", "shared"] = Field(
        "auto",
        description="padded: rows of like length together; packed: without padding; shared: what rows begin with in "
        "common once; auto: shared where that pays (most tokens are common), else padded.",
    )
    micro_batch_tokens: PositiveInt = Field(8192, description="Tokens in one forward pass of a rank, padding included.")
    logprob_chunk: PositiveInt = Field(4096, description="Tokens whose logits are held at once.")
    gradient_checkpointing: bool = False
    non_finite: Literal["stop", "skip"] = Field("stop", description="A non-finite step: end the run, or go on.")
    threads: PositiveInt | None = Field(None, description="CPU threads of one rank; null: cores / ranks.")
    step_timeout_s: PositiveFloat = Field(600.0, description="A step must end by then.")
    start_timeout_s: PositiveFloat = Field(300.0, description="All ranks must have met and loaded the model by then.")
    optimizer: OptimizerConfig = OptimizerConfig()


# ---- the rest -----------------------------------------------------------------------------------------------------


class WeightsConfig(Strict):
    engine: Literal["object_store", "nccl"] = Field(
        "object_store", description="nccl: by broadcast from GPU to GPU, GPU profile only; not run yet."
    )
    kv_cache: Literal["recompute", "keep", "share"] = Field(
        "recompute",
        description="After an update: recompute the cache of running requests (exact), keep it, or keep it and let new "
        "requests begin with cached states of older weights, too.",
    )
    timeout_s: PositiveFloat = Field(60.0, description="One generator must take an update by then.")


Limits = tuple[PositiveInt, PositiveInt]


class AutoscaleConfig(Strict):
    """Sizes that follow the load, one worker more or fewer at a time, as `rlsys scale` would change them."""

    generators: Limits | None = Field(None, description="Fewest and most; null: as many as there are.")
    reward_workers: Limits | None = Field(None, description="Fewest and most; null: as many as there are.")
    grow_above: Fraction = Field(
        0.3, description="One more where the run waited for its stage for more than this share of the time."
    )
    shrink_below: Fraction = Field(
        0.05, description="One fewer where it waited for the learner, and for each stage less than this."
    )
    window: PositiveInt = Field(10, description="Steps that are looked at.")
    cooldown: NonNegativeInt = Field(
        5, description="Steps that do not count at first, and after a change, from when every worker is there."
    )
    retry_after: PositiveInt = Field(
        100, description="Steps until what did not do is tried again: growth without room, a size that was too small."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        named = {name: limits for name in ("generators", "reward_workers") if (limits := getattr(self, name))}
        if not named:
            raise ValueError("names no role: give generators or reward_workers as [fewest, most], or leave it null")
        for name, (fewest, most) in named.items():
            if fewest > most:
                raise ValueError(f"{name}: [{fewest}, {most}] has the fewest last")
        if self.shrink_below >= self.grow_above:
            raise ValueError(f"shrink_below ({self.shrink_below:g}) must be less than grow_above ({self.grow_above:g})")
        return self


class DriverConfig(Strict):
    prompts_per_step: PositiveInt = 64
    max_staleness: NonNegativeInt = Field(1, description="Bound S in weight versions. 0: synchronous, deterministic.")
    max_groups_in_flight: PositiveInt | None = Field(None, description="null: as the staleness bound allows.")
    restarts: NonNegativeInt = Field(
        3,
        description="Restarts in a row without progress before a role, or with --supervise the driver, is given up.",
    )
    silence_timeout_s: PositiveFloat = Field(
        60.0, description="A process that gives no sign of life for so long is given up and restarted."
    )
    autoscale: AutoscaleConfig | None = Field(None, description="null: sizes change by `rlsys scale` only.")


class EvalConfig(Strict):
    prompts: PositiveInt = 512
    samples_per_prompt: PositiveInt = 1
    temperature: NonNegativeFloat = 1.0
    every: NonNegativeInt = Field(0, description="Steps between evaluations while training; 0: none.")
    every_prompts: PositiveInt | None = Field(None, description="Problems of an evaluation while training; null: all.")
    keep_responses: NonNegativeInt = Field(
        512, description="Problems of which the responses at each evaluation are kept on disk, the first ones; 0: none."
    )
    before: bool = True
    after: bool = True
    timeout_s: PositiveFloat = 600.0


class CheckpointConfig(Strict):
    every: NonNegativeInt = Field(50, description="Steps between checkpoints; 0: only at the end.")
    keep_last: PositiveInt = Field(2, description="Newest checkpoints kept.")
    keep_best: NonNegativeInt = Field(1, description="And so many with the best held-out accuracy; 0: none.")
    keep_every: NonNegativeInt = Field(0, description="And for ever those of every so many steps; 0: none.")


class WandbConfig(Strict):
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online when a W&B key is in the environment, else offline."
    )
    project: str = "rlsys"
    entity: str | None = None
    group: str | None = Field(None, description="Runs that belong together, such as the seeds of one experiment.")
    job_type: str | None = Field(None, description="What the run is within its group.")
    tags: tuple[str, ...] = ()
    table_every: NonNegativeInt = Field(10, description="Steps between rows of the sample table; 0: none.")
    table_rows: PositiveInt = 4
    log_model: bool = Field(False, description="Keep the final model as an artifact.")


class AlertsConfig(Strict):
    """What is reported of a run, beside deaths and hangs of its parts; null: that is not looked for."""

    window: PositiveInt = Field(20, description="Steps that means are taken over.")
    entropy: Fraction | None = Field(0.1, description="Entropy below this share of what it was at first.")
    length_growth: PositiveFloat | None = Field(
        1.5, description="Responses so many times as long as at the best evaluation, while the accuracy is lower."
    )
    accuracy_drop: NonNegativeFloat = Field(
        0.05, description="length_growth: lower than at its best by more than this."
    )
    stall: PositiveFloat | None = Field(10.0, description="A step that takes so many times the median of those before.")
    quiet_steps: PositiveInt = Field(50, description="Steps until the same thing is reported again.")


class TrackersConfig(Strict):
    wandb: WandbConfig = WandbConfig()
    alerts: AlertsConfig = AlertsConfig()
    tensorboard: bool = Field(False, description="Event files in RUN/tensorboard; needs the package `tensorboard`.")
    prometheus: Literal["auto"] | bool = Field(
        "auto", description="Gauges of Ray's metrics agents; auto: on a running cluster (resources.ray_address)."
    )
    timeline: bool = True
    console: Literal["auto", "live", "plain", "none"] = Field("auto", description="auto: live on a terminal.")


class Claim(Strict):
    """What one worker of a role takes of its node, and which nodes it may be on."""

    cpus: NonNegativeFloat | None = Field(None, description="null: the threads that it computes with.")
    gpus: NonNegativeFloat | None = Field(None, description="null: what its role needs on this profile.")
    memory_gib: PositiveFloat | None = Field(None, description="null: memory is not claimed.")
    custom: dict[str, PositiveFloat] = Field({}, description="Custom resources of Ray.")
    labels: dict[str, str] = Field(
        {}, description="Of the node, as Ray selects them: value, !value, in(a,b), !in(a,b)."
    )
    strategy: Literal["pack", "spread", "strict_pack", "strict_spread"] | None = Field(
        None, description="Of the workers of a role over nodes. null: pack the learner, spread the others."
    )


class ClaimsConfig(Strict):
    """What the roles claim of a cluster."""

    learner: Claim = Claim()
    generator: Claim = Claim()
    rewarder: Claim = Claim()
    reference: Claim = Claim()


class ResourcesConfig(Strict):
    """What the run may use of the machine or cluster."""

    cores: PositiveInt | None = Field(None, description="null: what the machine has.")
    memory_gib: PositiveFloat | None = Field(None, description="null: what the machine has.")
    object_store_gib: PositiveFloat = 0.5
    ray_address: str | None = Field(None, description="null: a private cluster on this machine; auto: the running one.")
    roles: ClaimsConfig = ClaimsConfig()
    placement_timeout_s: NonNegativeFloat = Field(
        0.0, description="How long to wait for room on the cluster, such as nodes that an autoscaler adds."
    )


class Sizes(Strict):
    """What can be changed while a run goes on (`rlsys scale`); null: as it is."""

    generators: PositiveInt | None = None
    reward_workers: PositiveInt | None = None
    learner_ranks: PositiveInt | None = None
    zero_stage: Literal[0, 1, 2, 3] | None = None


class Config(Strict):
    """A run."""

    run: RunConfig = RunConfig()
    profile: Literal["cpu", "gpu"] = "cpu"
    model: ModelConfig
    prompts: PromptsConfig
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig
    reference: ReferenceConfig = ReferenceConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    weights: WeightsConfig = WeightsConfig()
    driver: DriverConfig = DriverConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    trackers: TrackersConfig = TrackersConfig()
    resources: ResourcesConfig = ResourcesConfig()
