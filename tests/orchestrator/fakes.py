"""A `Cluster` in memory that really writes folders: hosts train by counting, all of it inside `poll`."""

from __future__ import annotations

import json
import struct
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.contracts import Capacity, LivingHost, TaskResult
from orchestrator.store.engine import Part
from workers.manifest import folder_digest, json_digest, publish_folder, verify_folder
from workers.types import (
    Attach,
    Attached,
    CheckpointSaved,
    Detach,
    Detached,
    Evaluate,
    EvaluationDone,
    EvaluationFailed,
    EvaluationReport,
    Event,
    FuseTask,
    HostFailed,
    HostMeasured,
    HostReady,
    JobSpec,
    JobStopped,
    MemoryModel,
    Progress,
    SearchDone,
    SearchWeights,
    StepDone,
    TrainingFinished,
    Validated,
)

MODULE = "model.layers.0.self_attn.q_proj"
METRICS: dict[str, dict[str, float]] = {
    "classification": {"macro_f1": 0.9, "accuracy": 0.9, "loss": 0.2},
    "chat": {"perplexity": 5.0, "loss": 1.6},
    "recommendation": {"hit_at_1": 0.5, "mrr": 0.6},
}


@dataclass
class FakeHost:
    """Commands take effect at the next poll; then each resident does one step."""

    ready: HostReady
    faults: Faults
    mail: deque[Any] = field(default_factory=deque)
    residents: dict[str, tuple[JobSpec, int]] = field(default_factory=dict)
    polls: int = 0

    def poll(self) -> list[Event]:
        self.polls += 1
        if self.polls == 1:
            return []
        events: list[Event] = [self.ready] if self.polls == 2 else []
        room, half = self.faults.adapter_room, self.faults.half_speed_tokens
        if self.polls == 2 and (room is not None or half is not None):
            memory = MemoryModel(1 << 30, 1 << 20, 100.0, 16)
            events.append(HostMeasured(512, False, 512, memory, room or 1 << 20, half))
        while self.mail:
            events += self.apply(self.mail.popleft())
        for job in list(self.residents):
            events += self.step(job)
        return events

    def apply(self, command: Any) -> list[Event]:
        if isinstance(command, Attach):
            return self.attach(command.job)
        if isinstance(command, Detach):
            spec, step = self.residents.pop(command.job, (None, 0))
            return [Detached(command.job, command.attempt, step)] if spec else []
        if isinstance(command, SearchWeights):
            return [search(command)]
        assert isinstance(command, Evaluate)
        return [self.evaluate(command)]

    def attach(self, spec: JobSpec) -> list[Event]:
        held = self.residents.get(spec.job)
        if held is not None and held[0].attempt == spec.attempt:
            return []  # said twice
        assert len(self.residents) < self.ready.slots, "no free slot"
        if (self.faults.alone or self.faults.adapter_room is not None) and self.residents:
            return [
                JobStopped(spec.job, spec.attempt, 0, "waits_for_memory", "it does not fit beside others")
            ]
        done = max((int(p.name[5:]) for p in Path(spec.checkpoint_dir).glob("step-*")), default=0)
        steps = spec.training.max_steps or 0
        attached = Attached(spec.job, spec.attempt, done, steps, 10, 100)
        if done >= steps:
            return [attached, TrainingFinished(spec.job, spec.attempt, done, write_adapter(spec))]
        self.residents[spec.job] = (spec, done)
        return [attached]

    def step(self, job: str) -> list[Event]:
        spec, step = self.residents[job]
        code = self.faults.stops.get((job.rpartition(".")[2], step + 1))
        if code:
            del self.residents[job]
            return [JobStopped(job, spec.attempt, step, code, "it cannot go on")]
        step += 1
        self.residents[job] = (spec, step)
        loss = 1.0 / (step + spec.training.seed)
        events: list[Event] = [StepDone(job, spec.attempt, step, loss, 0.5, 1e-3, 64, 0.5)]
        if step % 2 == 0:
            events += [Validated(job, spec.attempt, step, loss + 0.1), save(spec, step)]
        if step >= (spec.training.max_steps or 0):
            del self.residents[job]
            events.append(TrainingFinished(job, spec.attempt, step, write_adapter(spec)))
        return events

    def evaluate(self, command: Evaluate) -> Event:
        if self.faults.evaluation_error:
            return EvaluationFailed(command.request, self.faults.evaluation_error)
        task_type = command.evaluation.datasets[0].type
        scale = 1.0
        if command.adapter_dir is not None:
            verify_folder(Path(command.adapter_dir))
        else:
            scale = 0.25
        metrics = {
            key: value / scale if key in ("loss", "perplexity") else value * scale
            for key, value in METRICS[task_type].items()
        }
        return EvaluationDone(command.request, EvaluationReport(task_type, metrics, 4, ({"row": 0},)), 0.1)


FLOORS = {"finance-sentiment.macro_f1": 0.9, "support.loss": 0.9}


@dataclass
class Faults:
    """What goes wrong, and when."""

    stops: dict[tuple[str, int], Any] = field(default_factory=dict)
    """(job name, step) -> stop code instead of that step."""
    lose_at: set[int] = field(default_factory=set)
    """Hosts die at these polls, counted over all hosts."""
    evaluation_error: str = ""
    adapter_room: int | None = None
    """What hosts have measured; a host that has takes one adapter at a time."""
    half_speed_tokens: int | None = None
    """What hosts have measured; a step of a job has 64 tokens."""
    alone: bool = False
    """Hosts have no memory for a second adapter, and do not know it."""
    task_result: TaskResult | None = None
    task_polls: int = 0
    """How often a task is asked for its result before it has one."""
    refuse_hosts: Exception | None = None


def save(spec: JobSpec, step: int) -> CheckpointSaved:
    folder = Path(spec.checkpoint_dir) / f"step-{step}"
    if not folder.exists():
        with publish_folder(folder) as scratch:
            (scratch / "state.json").write_text(json.dumps(step))
    return CheckpointSaved(spec.job, spec.attempt, step, str(folder))


def write_adapter(spec: JobSpec) -> str:
    """A function of the training alone, like the real one: neither of its job nor of its attempt."""
    folder = Path(spec.checkpoint_dir) / "adapter"
    if not folder.exists():
        with publish_folder(folder) as scratch:
            about = [_taught(spec) or spec.train[0].type, asdict(spec.adapter), asdict(spec.training)]
            write_peft(scratch, spec.adapter.r, spec.adapter.lora_alpha, json_digest(about))
    if spec.checkpoint_url:
        from workers.object_store import ObjectStore

        ObjectStore(spec.checkpoint_url).put(folder)
    return str(folder)


def write_peft(folder: Path, r: int, lora_alpha: float, seed: str) -> None:
    """PEFT's two files, of one module; numbers by `seed`, a digest. Without numpy: the fakes are many."""
    numbers = array("f", [(byte - 128) / 128 for byte in bytes.fromhex(seed) * (r // 4 + 1)][: 8 * r])
    shapes = {"A": [r, 8], "B": [8, r]}
    size = 32 * r
    header = {
        f"base_model.model.{MODULE}.lora_{side}.weight": {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [place * size, (place + 1) * size],
        }
        for place, (side, shape) in enumerate(shapes.items())
    }
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + numbers.tobytes() * 2
    )
    config = {"peft_type": "LORA", "r": r, "lora_alpha": lora_alpha, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def search(command: SearchWeights) -> Event:
    """One trial, with the plan's own weights."""
    run_task(command.search.plan)
    trial = {
        "retention": dict.fromkeys(FLOORS, 1.0),
        "weights": [list(command.search.plan.weights)],
        "pareto": True,
    }
    table = {"floors": FLOORS, "best": 0, "trials": [trial]}
    return SearchDone(command.request, {"rule": command.search.plan.rule, "search": table})


def _taught(spec: JobSpec) -> list[str]:
    """Of a distillation: the bytes of what teaches it; reading them is half of the test."""
    if spec.distill is None:
        return []
    folders = [teacher.adapter_dir for teacher in spec.distill.teachers] + [spec.distill.start]
    for folder in filter(None, folders):
        verify_folder(Path(folder))
    return [folder_digest(Path(folder)) if folder else "none" for folder in folders]


class FakeCluster:
    """Implements `Cluster`. `log` has every call that asked for work."""

    def __init__(self, cpus: float = 2.0, faults: Faults | None = None) -> None:
        self.cpus = cpus
        self.faults = faults or Faults()
        self.hosts: dict[str, FakeHost] = {}
        self.sizes: dict[str, int] = {}
        self.tasks: dict[str, TaskResult] = {}
        self.asked_of: dict[str, int] = {}
        """How often each task was asked for its result in vain."""
        self.log: list[tuple[str, Any]] = []
        self.polls = 0

    def adopt(self, epoch: int) -> Sequence[LivingHost]:
        return ()

    def capacity(self) -> Capacity:
        return Capacity(self.cpus - sum(self.sizes.values()), 0)

    def start_host(self, host: str, base: Any, world_size: int) -> None:
        if self.faults.refuse_hosts:
            raise self.faults.refuse_hosts
        assert world_size <= self.capacity().cpus, "more ranks than there is room for"
        self.log.append(("start_host", host))
        self.hosts[host] = FakeHost(HostReady(world_size, "3", base.slots, 1000, 0.1), self.faults)
        self.sizes[host] = world_size

    def send(self, host: str, command: Any) -> None:
        self.log.append((type(command).__name__, command))
        if host in self.hosts:
            assert self.hosts[host].polls > 1, "the host is not ready"
            self.hosts[host].mail.append(command)

    def poll(self, host: str) -> list[Event]:
        if host not in self.hosts:
            return []
        self.polls += 1
        if self.polls in self.faults.lose_at:
            self.stop_host(host)
            return [HostFailed("rank 1 died")]
        return self.hosts[host].poll()

    def stop_host(self, host: str) -> None:
        if self.hosts.pop(host, None):
            del self.sizes[host]

    def submit_task(self, task_id: str, task: Any) -> None:
        self.log.append((type(task).__name__, task))
        self.tasks[task_id] = self.faults.task_result or run_task(task)

    def task_result(self, task_id: str) -> TaskResult | None:
        if self.asked_of.get(task_id, 0) >= self.faults.task_polls:
            return self.tasks[task_id]
        self.asked_of[task_id] = self.asked_of.get(task_id, 0) + 1
        return None

    def task_progress(self, task_id: str) -> Progress | None:
        done = self.asked_of.get(task_id)
        return Progress(done, self.faults.task_polls) if done else None

    def forget_task(self, task_id: str) -> None:
        del self.tasks[task_id]
        self.asked_of.pop(task_id, None)

    def close(self) -> None:
        for host in list(self.hosts):
            self.stop_host(host)

    def asked(self, kind: str) -> list[Any]:
        return [value for name, value in self.log if name == kind]


def run_task(task: Any) -> TaskResult:
    folder = Path(task.out_dir)
    if not folder.exists():
        with publish_folder(folder) as scratch:
            if isinstance(task, FuseTask):
                digests = [folder_digest(Path(source)) for source in task.adapter_dirs]
                write_peft(scratch, 4, 4, json_digest([digests, list(task.weights)]))
            else:
                for name, text in task.extra_files:
                    (scratch / name).write_text(text)
    fused = {"rule": task.rule, "cosines": [[1.0]]} if isinstance(task, FuseTask) else {}
    return TaskResult(value={"out_dir": str(folder), **fused})


def at_once(work: Callable[[], None]) -> None:
    """Has an errand done on the spot: no thread, so every run is the same."""
    work()


class Later:
    """Errands are done when the test says so, in the order in which they were begun."""

    def __init__(self) -> None:
        self.held = False
        self.waiting: list[Callable[[], None]] = []

    def __call__(self, work: Callable[[], None]) -> None:
        self.waiting.append(work)
        if not self.held:
            self.do()

    def do(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


class Mortal:
    """Passes every call on to `inner`; dies before or after one of them, counted with its siblings."""

    def __init__(self, inner: Any, tick: Callable[[], None]) -> None:
        self._inner = inner
        self._tick = tick

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if isinstance(value, Part):
            return Mortal(value, self._tick)
        if not callable(value):
            return value

        def call(*arguments: Any, **named: Any) -> Any:
            self._tick()
            result = value(*arguments, **named)
            self._tick()
            return result

        return call


class Fuse:
    """Burns down with every tick and then kills."""

    def __init__(self, length: int) -> None:
        self.left = length

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed
