"""What a config comes to, before anything is started: batches, staleness, workers, memory, and what cannot work.

Figures marked "at most" take every prompt and response at its longest.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from rlsys.config.models import Config, TinyModelConfig
from rlsys.errors import ConfigError

GIB = 1024**3

# Memory of each kind of worker in GiB without model and data: proportional set size on the CPU profile, rounded up.
_GENERATOR_GIB = 1.1  # the actor and the engine process that it starts
_LEARNER_GIB = 0.4
_REFERENCE_GIB = 0.4
_REWARDER_GIB = 0.2  # the worker and the process that runs the functions
_DRIVER_GIB = 0.4  # with W&B's service
_RAY_GIB = 0.4  # Ray's own processes, the object store aside
_OPTIMIZER_BYTES = 8  # AdamW: two float32 moments of each parameter
_MASTER_BYTES = 4  # the float32 copy of a bfloat16 parameter
_SNAPSHOT_BYTES = 12  # weights and moments in float32, copied to rank 0's host memory while a checkpoint is written
_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's CPU attention
_ACTIVATION_FACTOR = 20  # floats kept per token, layer and hidden unit for the backward pass


@dataclass(frozen=True, slots=True)
class Machine:
    cores: int
    memory_gib: float
    gpus: int


@dataclass(frozen=True, slots=True)
class ModelSize:
    parameters: int
    layers: int
    hidden_size: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What the plan needs and the config alone does not say; None where it is not known before the start."""

    epochs: int = 1
    minibatches: int = 1
    needs_reference: bool = False
    needs_critic: bool = False
    needs_samples: bool = False  # of the policy
    needs_expert: bool = False  # a demonstration of every prompt
    train_rows: int | None = None  # None: endless
    eval_prompts: int | None = None  # held-out problems there are, at most eval.prompts
    longest_prompt: int | None = None  # tokens, of the rows looked at
    sampled_tokens: float | None = None  # about, for one prompt, where it is more than its samples
    model: ModelSize | None = None


@dataclass(frozen=True, slots=True)
class RolePlan:
    """One kind of worker; `threads`, `gpus` and `memory_gib` are those of one."""

    name: str
    workers: int
    threads: int
    gpus: int
    memory_gib: float


@dataclass(frozen=True, slots=True)
class Plan:
    prompts_per_step: int
    samples_per_prompt: int
    rollouts_per_step: int
    staleness_bound: int
    groups_in_flight: int  # at most
    row_tokens: int  # at most, prompt and response
    response_tokens_per_step: int  # at most
    tokens_per_step: int  # at most, prompts and responses
    sampled_per_step: float  # about; response tokens, with branches
    epochs: int
    minibatches: int
    updates_per_step: int
    rows_per_update: int
    micro_batches_per_rank: int  # at most, in one update
    rows_per_micro_batch: int  # at the longest
    steps: int
    updates: int
    rollouts: int
    train_rows: int | None
    steps_per_epoch: float | None
    epochs_of_data: float | None
    eval_prompts: int | None
    roles: tuple[RolePlan, ...]
    memory_gib: float
    gpus: int
    machine: Machine
    cluster: str | None  # the address of a cluster, which is not looked at
    problems: tuple[str, ...]

    def check(self) -> None:
        """Raise one ConfigError with every problem."""
        if self.problems:
            raise ConfigError("\n".join(self.problems))


def this_machine(config: Config) -> Machine:
    """What the run may use here: `resources`, else what the machine, its affinity mask and its cgroup leave."""
    import psutil

    memory = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip().isdecimal():
        memory = min(memory, int(limit.read_text()))
    nvidia = Path("/proc/driver/nvidia/gpus")
    return Machine(
        cores=config.resources.cores or len(os.sched_getaffinity(0)),
        memory_gib=config.resources.memory_gib or memory / GIB,
        gpus=len(list(nvidia.iterdir())) if nvidia.is_dir() else 0,
    )


def tiny_size(config: TinyModelConfig, vocabulary: int) -> ModelSize:
    """The size of a tiny Qwen3 with tied embeddings."""
    h, d = config.hidden_size, config.head_dim
    attention = h * d * (2 * config.heads + 2 * config.key_value_heads) + 2 * d  # q, o, k, v, and the norms of q and k
    layer = attention + 3 * h * config.intermediate_size + 2 * h
    return ModelSize(vocabulary * h + config.layers * layer + h, config.layers, h, vocabulary)


def make_plan(config: Config, facts: Facts, machine: Machine) -> Plan:
    """The arithmetic of a run. Nothing is raised: see `Plan.problems` and `Plan.check`."""
    rollout, driver, learner = config.rollout, config.driver, config.learner
    prompts, samples = driver.prompts_per_step, rollout.samples_per_prompt + facts.needs_expert
    rollouts = prompts * samples
    room = max(1, config.model.max_length - rollout.max_new_tokens)
    row_tokens = min(config.model.max_length, (facts.longest_prompt or room) + rollout.max_new_tokens)
    in_flight = (driver.max_staleness + 1) * prompts
    if driver.max_groups_in_flight is not None:
        in_flight = min(in_flight, driver.max_groups_in_flight)
    rows_per_update = math.ceil(rollouts / facts.minibatches)
    rows_per_micro_batch = max(1, learner.micro_batch_tokens // row_tokens)
    roles = _roles(config, facts, row_tokens, machine.cores)
    return Plan(
        prompts_per_step=prompts,
        samples_per_prompt=samples,
        rollouts_per_step=rollouts,
        staleness_bound=driver.max_staleness,
        groups_in_flight=in_flight,
        row_tokens=row_tokens,
        response_tokens_per_step=rollouts * rollout.max_new_tokens,
        tokens_per_step=rollouts * row_tokens,
        sampled_per_step=prompts * (facts.sampled_tokens or samples * rollout.max_new_tokens),
        epochs=facts.epochs,
        minibatches=facts.minibatches,
        updates_per_step=facts.epochs * facts.minibatches,
        rows_per_update=rows_per_update,
        micro_batches_per_rank=math.ceil(math.ceil(rows_per_update / learner.ranks) / rows_per_micro_batch),
        rows_per_micro_batch=rows_per_micro_batch,
        steps=config.run.steps,
        updates=config.run.steps * facts.epochs * facts.minibatches,
        rollouts=config.run.steps * rollouts,
        train_rows=facts.train_rows,
        steps_per_epoch=None if facts.train_rows is None else facts.train_rows / prompts,
        epochs_of_data=None if facts.train_rows is None else config.run.steps * prompts / facts.train_rows,
        eval_prompts=facts.eval_prompts,
        roles=roles,
        memory_gib=sum(role.workers * role.memory_gib for role in roles),
        gpus=sum(role.workers * role.gpus for role in roles),
        machine=machine,
        cluster=config.resources.ray_address,
        problems=(*_arithmetic(config, facts), *_choices(config), *_capacity(config, roles, machine)),
    )


def generator_threads(config: Config, cores: int) -> int:
    """CPU threads of one engine: `rollout.engine.threads`, else half the cores, shared among the generators.

    The other half is left to the learner. More threads than cores are not a little but many times slower: every
    parallel loop waits for its thread that is not running.
    """
    return config.rollout.engine.threads or max(1, cores // 2 // config.rollout.generators)


def _roles(config: Config, facts: Facts, row_tokens: int, cores: int) -> tuple[RolePlan, ...]:
    gpu = config.profile == "gpu"
    learner, engine = config.learner, config.rollout.engine
    width = 4 if config.model.dtype == "float32" else 2
    parameters = facts.model.parameters if facts.model else 0
    weights = parameters * width / GIB

    state = float(parameters * (_OPTIMIZER_BYTES + (0 if width == 4 else _MASTER_BYTES)))
    gradients = held = float(parameters * width)
    if learner.zero_stage >= 1:
        state /= learner.ranks
    if learner.zero_stage >= 2:
        gradients /= learner.ranks
    if learner.zero_stage >= 3:
        held /= learner.ranks
    models = 2 if facts.needs_critic else 1
    training = models * (state + gradients + held) / GIB
    if facts.model:
        tokens = max(learner.micro_batch_tokens, row_tokens)
        kept = 1 if learner.gradient_checkpointing else _ACTIVATION_FACTOR
        training += 4 * tokens * facts.model.layers * facts.model.hidden_size * kept / GIB
        training += 3 * 4 * min(tokens, learner.logprob_chunk) * facts.model.vocabulary / GIB

    snapshot = models * _SNAPSHOT_BYTES * parameters / learner.ranks / GIB  # shared out, so that the sum is right
    # On the GPU profile weights and their company are in device memory, which is not added up here.
    host = 0.0 if gpu else 1.0
    roles = [
        RolePlan("driver", 1, 1, 0, _DRIVER_GIB + _RAY_GIB + config.resources.object_store_gib),
        RolePlan(
            "generator",
            config.rollout.generators,
            generator_threads(config, cores),
            engine.tensor_parallel if gpu else 0,
            _GENERATOR_GIB + host * (2 * weights + engine.kv_cache_gib),
        ),
        RolePlan(
            "learner rank",
            learner.ranks,
            learner.threads or max(1, cores // learner.ranks),
            int(gpu),
            _LEARNER_GIB + host * training + snapshot,
        ),
        RolePlan("reward worker", config.rewards.workers, 1, 0, _REWARDER_GIB),
    ]
    if facts.needs_reference:
        reference = config.reference
        copies = 1.0 if reference.average_with is None else 2.0
        if reference.update == "moving_average" and width < 4:
            copies += 4 / width  # kept in float32 beside the model
        memory = _REFERENCE_GIB + host * copies * weights
        roles.append(RolePlan("reference", 1, reference.threads or 1, int(gpu), memory))
    return tuple(roles)


def _arithmetic(config: Config, facts: Facts) -> list[str]:
    """Numbers that contradict each other."""
    problems = []
    rollout, driver, learner = config.rollout, config.driver, config.learner
    if rollout.max_new_tokens >= config.model.max_length:
        problems.append(
            f"rollout.max_new_tokens ({rollout.max_new_tokens}) leaves no room for a prompt in model.max_length "
            f"({config.model.max_length}): lower the one or raise the other"
        )
    if driver.prompts_per_step % facts.minibatches:
        problems.append(
            f"driver.prompts_per_step ({driver.prompts_per_step}) cannot be cut into algorithm.minibatches "
            f"({facts.minibatches}) of equal size: choose a multiple"
        )
    if rollout.samples_per_prompt == 0 and facts.needs_samples:
        problems.append(
            "rollout.samples_per_prompt is 0, but the algorithm learns from the policy's own samples: raise it, or "
            "choose one that learns from demonstrations alone (algorithm.preset: sft)"
        )
    rows = driver.prompts_per_step * (rollout.samples_per_prompt + facts.needs_expert) // facts.minibatches
    if 0 < rows < learner.ranks:
        problems.append(
            f"learner.ranks ({learner.ranks}) is more than the {rows} rollouts of one update (driver.prompts_per_step "
            "x rollout.samples_per_prompt / algorithm.minibatches): some ranks would have nothing to do"
        )
    if config.prompts.eval is None and config.eval.every:
        problems.append(f"eval.every is {config.eval.every}, but prompts.eval is null: there is nothing to evaluate on")
    sizes = {
        "generators": ("rollout.generators", rollout.generators),
        "reward_workers": ("rewards.workers", config.rewards.workers),
    }
    for role, (fewest, most) in _autoscaled(config).items():
        key, size = sizes[role]
        if not fewest <= size <= most:
            problems.append(
                f"{key} ({size}) is not within driver.autoscale.{role} [{fewest}, {most}]: change the one or the other"
            )
    return problems


def _autoscaled(config: Config) -> dict[str, tuple[int, int]]:
    """The fewest and the most workers of the roles whose sizes follow the load."""
    autoscale = config.driver.autoscale
    roles = {} if autoscale is None else {role: getattr(autoscale, role) for role in ("generators", "reward_workers")}
    return {role: limits for role, limits in roles.items() if limits is not None}


def _choices(config: Config) -> list[str]:
    """Settings that exclude each other."""
    problems = []
    model, gpu = config.model, config.profile == "gpu"
    if (model.path is None) == (model.tiny is None):
        both = "both are" if model.path else "neither is"
        problems.append(f"model.path or model.tiny: {both} given; give exactly one")
    if model.tiny is not None and model.tiny.heads % model.tiny.key_value_heads:
        problems.append(
            f"model.tiny.heads ({model.tiny.heads}) must be a multiple of model.tiny.key_value_heads "
            f"({model.tiny.key_value_heads})"
        )
    if model.tiny is not None and model.tiny.warm_start.steps and config.prompts.train.kind != "sums":
        problems.append(
            f"model.tiny.warm_start fits the model to worked sums, but prompts.train.kind is "
            f"{config.prompts.train.kind}: set model.tiny.warm_start.steps to 0, or give a model.path"
        )
    if config.run.storage is not None and config.trackers.wandb.log_model:
        problems.append(
            "trackers.wandb.log_model takes the model from run.dir, where it is not with run.storage: leave it out, "
            "and take the model from the storage (rlsys export)"
        )
    if config.weights.engine == "nccl" and config.reference.update != "frozen":
        problems.append(
            f"reference.update: {config.reference.update} needs weights.engine: object_store, from where the reference "
            "takes the policy's weights"
        )
    if config.weights.kv_cache == "share" and config.driver.max_staleness == 0:
        problems.append(
            "weights.kv_cache: share lets requests begin with what older weights read, which driver.max_staleness: 0 "
            "rules out; use recompute, or a bound of 1 or more"
        )
    if config.weights.engine == "nccl" and not gpu:
        problems.append("weights.engine: nccl needs profile: gpu; on profile cpu use object_store")
    if not gpu:
        if model.tiny is not None and model.tiny.head_dim not in _CPU_HEAD_SIZES:
            problems.append(
                f"model.tiny.head_dim ({model.tiny.head_dim}) must be one that vLLM has on a CPU: "
                f"{', '.join(map(str, _CPU_HEAD_SIZES))}"
            )
        if config.rollout.engine.tensor_parallel > 1:
            problems.append("rollout.engine.tensor_parallel needs profile: gpu; on profile cpu it is 1")
        if config.learner.offload:
            problems.append("learner.offload needs profile: gpu; on profile cpu everything is in host memory already")
    if model.dtype != "float32" and config.learner.zero_stage == 0:
        problems.append(
            f"learner.zero_stage: 0 keeps no float32 master weights for model.dtype {model.dtype}; use 1, 2 or 3"
        )
    if config.learner.offload and config.learner.zero_stage < 2:
        problems.append(f"learner.offload needs learner.zero_stage 2 or 3; it is {config.learner.zero_stage}")
    return problems


def _capacity(config: Config, roles: tuple[RolePlan, ...], machine: Machine) -> list[str]:
    """More workers than the machine holds. A cluster answers for itself when the run joins it."""
    if config.resources.ray_address is not None:
        return []
    problems = []
    for key, workers in (("rollout.generators", config.rollout.generators), ("learner.ranks", config.learner.ranks)):
        if workers > machine.cores:
            problems.append(f"{key} ({workers}) is more than the {machine.cores} cores of this machine: lower it")
    most = _autoscaled(config).get("generators", (0, 0))[1]
    if most > machine.cores:
        problems.append(
            f"driver.autoscale.generators goes up to {most}, more than the {machine.cores} cores of this machine"
        )
    if config.profile == "gpu":
        gpus = sum(role.workers * role.gpus for role in roles)
        if gpus > machine.gpus:
            parts = ", ".join(f"{role.workers} x {role.name} ({role.gpus})" for role in roles if role.gpus)
            problems.append(
                f"profile gpu: {gpus} GPUs are needed ({parts}), this machine has {machine.gpus}: lower "
                "rollout.generators, rollout.engine.tensor_parallel or learner.ranks, set resources.ray_address to "
                "join a cluster, or use --profile cpu"
            )
    memory = sum(role.workers * role.memory_gib for role in roles)
    if memory > machine.memory_gib:
        parts = ", ".join(f"{role.workers} x {role.name} {role.memory_gib:.1f}" for role in roles)
        problems.append(
            f"about {memory:.1f} GiB of memory are needed ({parts}), this machine has {machine.memory_gib:.1f} GiB: "
            "lower rollout.generators, rewards.workers, learner.ranks or rollout.engine.kv_cache_gib"
        )
    return problems
