"""Shares of each GPU's memory: the engine, pooling engines and packed reward models, planned together.

Nothing here touches a device: from what is free before anything starts, and what every model needs, follows a plan or
the reason why there is none. The plan holds as long as the server runs. vLLM gets its part as a share of the *whole*
device, which is how it defines its utilization, so that a restarted engine finds the part free that it had, however
much the reward models beside it hold.

Each GPU gives `utilization` of its memory, or what is free of it minus one CUDA context per process. Of that every
model gets the least that it runs with; then reward models get keys and values for as long a text as they read; the
engine gets the rest, unless the operator says how much it needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.memory.devices import Gpu
from guiderail.server.memory.kv_pool import default_pool, gib, least_pool

CONTEXT = 640 * 2**20  # bytes that a process takes on a GPU before it allocates: CUDA context, libraries, workspaces


class PlanError(GuiderailError):
    """There is no plan: something does not fit, or is to be on a device that is not there."""


@dataclass(frozen=True, slots=True)
class EngineNeed:
    """Needs of the engine, in bytes over all its GPUs; `work` and `kv` are for each of them.

    weights and context (keys and values of one sequence as long as the model reads) are 0 if unknown: then vLLM is
    the first to know whether it fits. kv: keys and values as set by the operator; None: what is left.
    """

    weights: int
    context: int
    work: int
    gpus: int = 1
    kv: int | None = None


@dataclass(frozen=True, slots=True)
class RewardNeed:
    """Needs of a reward model, in bytes. kv_token: keys and values of a token. longest: tokens that it reads.

    device: "cuda:N" if the operator chose; None: the planner does. kv: keys and values as set by the operator; None:
    enough for `longest` and a pass besides.
    """

    name: str
    backend: str
    weights: int
    work: int
    kv_token: int
    longest: int | None
    device: str | None = None
    kv: int | None = None

    @property
    def wish(self) -> int:
        """Bytes of keys and values with which it reads the longest text."""
        return self.kv if self.kv is not None else default_pool(self.longest, self.kv_token)

    @property
    def floor(self) -> int:
        """Fewest bytes of keys and values that it runs with."""
        return self.kv if self.kv is not None else least_pool(self.longest, self.kv_token)

    @property
    def least(self) -> int:
        """Fewest bytes that it takes."""
        return self.weights + self.work + self.floor


@dataclass(frozen=True, slots=True)
class EngineShare:
    """The engine's part of each of its GPUs: vLLM's gpu_memory_utilization, and bytes of keys and values if fixed."""

    utilization: float
    kv: int | None = None


@dataclass(frozen=True, slots=True)
class RewardShare:
    """Device and part of a reward model: bytes of keys and values, and the utilization of a vLLM engine of its own.

    On the CPU kv is None: it is decided when the model is loaded (kv_pool.py). limit: for a packed model on a GPU, the
    part of its memory that this process may allocate without touching the shares of vLLM processes there.
    """

    device: str
    kv: int | None = None
    utilization: float | None = None
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Parts of all models, and lines about them for the start. Empty without a GPU."""

    engine: EngineShare | None = None
    rewards: dict[str, RewardShare] = field(default_factory=dict)
    lines: tuple[str, ...] = ()

    @property
    def beside(self) -> str:
        """Device for small models of this process: a GPU on which it has others anyway, or the CPU."""
        return next((share.device for share in self.rewards.values() if share.limit is not None), "cpu")


def plan(gpus: Sequence[Gpu], utilization: float, engine: EngineNeed | None, rewards: Sequence[RewardNeed]) -> Plan:
    """Plan the shares of these GPUs. The engine takes the first ones.

    utilization: the part of each GPU's memory that all together may take. Raises PlanError saying what does not
    fit where and what to change, and for a device that does not exist.
    """
    count = engine.gpus if engine is not None else 0
    if count > len(gpus):
        raise PlanError(f"--tensor-parallel-size {count}: only {len(gpus)} GPUs are visible")
    parts = [_Part(gpu, utilization, engine if i < count else None) for i, gpu in enumerate(gpus)]
    for reward in sorted(rewards, key=lambda each: (each.device is None, -each.weights)):
        _choose(parts, reward).rewards.append(reward)
    for part in parts:
        part.check(len(gpus))
    shares = {name: share for part in parts for name, share in part.reward_shares().items()}
    own = None
    if engine is not None:
        # One number is for all of the engine's GPUs. Rounded down: vLLM refuses a byte more than there is.
        own = EngineShare(min(int(p.engine_bytes() / p.gpu.total * 10_000) / 10_000 for p in parts[:count]), engine.kv)
    return Plan(own, shares, tuple(line for part in parts if (line := part.line(own))))


def _choose(parts: Sequence["_Part"], reward: RewardNeed) -> "_Part":
    """Choose the GPU with most left that is not the engine's; if none has room, the engine's with most left."""
    if reward.device is not None:
        found = [part for part in parts if f"cuda:{part.gpu.index}" == reward.device]
        if not found:
            there = ", ".join(f"cuda:{part.gpu.index}" for part in parts) or "no GPU"
            raise PlanError(f"--reward {reward.name}: there is no {reward.device}; there is {there}, and cpu")
        return found[0]
    if not parts:
        raise PlanError(f"--reward {reward.name}: there is no GPU")
    apart = [part for part in parts if part.engine is None]
    roomy = [part for part in apart if part.left(reward) >= 0]
    return max(
        roomy or [part for part in parts if part.engine is not None] or apart, key=lambda part: part.left(reward)
    )


@dataclass(slots=True)
class _Part:
    """One GPU while it is planned."""

    gpu: Gpu
    utilization: float
    engine: EngineNeed | None
    rewards: list[RewardNeed] = field(default_factory=list)

    @property
    def has_packed(self) -> bool:
        return any(reward.backend == "packed" for reward in self.rewards)

    @property
    def engines(self) -> int:
        """vLLM processes on this GPU."""
        return (self.engine is not None) + sum(reward.backend == "vllm" for reward in self.rewards)

    @property
    def room(self) -> int:
        """Bytes to share out, without contexts."""
        processes = self.engines + self.has_packed
        return min(int(self.gpu.total * self.utilization), self.gpu.free - CONTEXT * processes)

    def engine_least(self) -> int:
        """Return the fewest bytes that the engine needs."""
        if self.engine is None:
            return 0
        kv = self.engine.context // self.engine.gpus if self.engine.kv is None else self.engine.kv
        return self.engine.weights // self.engine.gpus + self.engine.work + kv

    def left(self, reward: RewardNeed) -> int:
        """Return the bytes left over if this reward came here too; negative if it does not fit."""
        with_it = _Part(self.gpu, self.utilization, self.engine, [*self.rewards, reward])
        return with_it.spare()

    def spare(self) -> int:
        return self.room - self.engine_least() - sum(reward.least for reward in self.rewards)

    def check(self, gpus: int) -> None:
        """Raise PlanError unless the least that every model needs fits."""
        if self.spare() >= 0 or not (self.engine or self.rewards):
            return
        needs = [f"reward {r.name} {gib(r.least)} (weights {gib(r.weights)})" for r in self.rewards]
        if self.engine is not None:
            weights = gib(self.engine.weights / self.engine.gpus)
            kv = "as --kv-cache-gb says" if self.engine.kv is not None else "of one whole context"
            size = gib(self.engine.kv if self.engine.kv is not None else self.engine.context / self.engine.gpus)
            needs.insert(0, f"the engine {gib(self.engine_least())} (weights {weights}, keys and values {kv} {size})")
        raise PlanError(
            f"GPU {self.gpu.index} ({self.gpu.name}) has {gib(self.gpu.total)}, {gib(self.gpu.free)} of them free; "
            f"of these {gib(max(0, self.room))} can be used, but {' and '.join(needs)} are needed at least: "
            + ", or ".join(self._advice(gpus))
        )

    def _advice(self, gpus: int) -> list[str]:
        advice = []
        if self.gpu.free < self.gpu.total * self.utilization:
            advice.append("end what else holds memory on it")
        elif self.utilization < 0.95:
            advice.append("raise --gpu-memory-utilization")
        if self.engine is not None and self.engine.kv is not None:
            advice.append("lower --kv-cache-gb")
        elif self.engine is not None and self.engine.context:
            advice.append("lower --max-model-len")
        if any(reward.kv is not None for reward in self.rewards):
            advice.append("lower the reward's kv_gb")
        if self.rewards and gpus > 1:
            advice.append("move a reward with device=cuda:N")
        if self.has_packed:
            advice.append("run the reward on the CPU with device=cpu")
        if self.engine is not None and self.engine.gpus < gpus:
            advice.append("raise --tensor-parallel-size")
        return [*advice, "use a smaller or a quantised model"]

    def kv(self, reward: RewardNeed) -> int:
        """Return the bytes of keys and values of a reward: its wish, or its part of what is left for all wishes."""
        extra = sum(each.wish - each.floor for each in self.rewards)
        part = min(1.0, self.spare() / extra) if extra else 1.0
        return reward.floor + int((reward.wish - reward.floor) * part)

    def reward_bytes(self, reward: RewardNeed) -> int:
        return reward.weights + reward.work + self.kv(reward)

    def reward_shares(self) -> dict[str, RewardShare]:
        device = f"cuda:{self.gpu.index}"
        return {
            reward.name: RewardShare(
                device,
                self.kv(reward),
                self.reward_bytes(reward) / self.gpu.total if reward.backend == "vllm" else None,
                self.process_limit() / self.gpu.total if reward.backend == "packed" else None,
            )
            for reward in self.rewards
        }

    def engine_bytes(self) -> int:
        """Return the bytes of the engine: all that is left, unless its keys and values were set."""
        if self.engine is None:
            return 0
        if self.engine.kv is not None:
            return self.engine_least()
        return self.room - sum(map(self.reward_bytes, self.rewards))

    def process_limit(self) -> int:
        """Return the bytes that this process may allocate here."""
        theirs = self.engine_bytes() + sum(self.reward_bytes(r) for r in self.rewards if r.backend == "vllm")
        return self.gpu.free - CONTEXT * (self.engines + 1) - theirs

    def line(self, engine: EngineShare | None) -> str:
        """Return what the start says of this GPU; "" if it is not used."""
        parts = [
            f"reward {r.name} {gib(self.reward_bytes(r))} ({r.backend}, weights {gib(r.weights)}, keys and values of "
            f"{self.kv(r) // r.kv_token:,} tokens{_shortened(r, self.kv(r))})"
            for r in self.rewards
        ]
        if self.engine is not None and engine is not None:
            weights = f", weights {gib(self.engine.weights / self.engine.gpus)}" if self.engine.weights else ""
            size = gib(engine.utilization * self.gpu.total)
            parts.insert(0, f"engine {size} ({engine.utilization:.2f} of the whole{weights})")
        where = f"GPU {self.gpu.index} ({self.gpu.name}, {gib(self.gpu.free)} of {gib(self.gpu.total)} free)"
        return f"{where}: {'; '.join(parts)}" if parts else ""


def _shortened(reward: RewardNeed, kv: int) -> str:
    tokens = kv // reward.kv_token
    if reward.longest is None or tokens >= reward.longest:
        return ""
    return f": longer texts are refused, though the model reads {reward.longest:,}"
