"""What a job would take, and where it would go, said when it is submitted. Pure.

An estimate at the pace of the latest jobs of its base. A tick of a host holds as many tokens as its budget,
whoever they are of: so a job that joins costs the host its own tokens, and lasts as long as its turns take.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from orchestrator.host_view import HostView
from orchestrator.placement import inviting
from orchestrator.scheduler import Snapshot

BYTES_PER_PARAMETER = 16
"""Of an adapter in training, in float32: weight, gradient and AdamW's two moments; on every rank."""


@dataclass(frozen=True)
class Ask:
    """A job that trains."""

    base: str
    """Key of the hosts it can sit on."""
    world_size: int
    adapter_parameters: int
    tokens: int | None
    """About so many, over all its steps; None if they could not be counted."""


@dataclass(frozen=True)
class Fit:
    never: str | None
    """Why it can never run on the cluster as it was last seen; None if it can, or nobody has looked."""
    host: str | None
    """The warm host it would join now; None if one must be opened or get room first."""
    beside: int
    """How many train on that host already."""
    memory_bytes: int
    """On each rank, the base excluded."""
    tokens: int | None
    seconds: float | None
    """Of training, once it has begun; None if the pace of its base is not known."""
    rank_seconds: float | None
    """What it adds to the work of its host's ranks: the marginal cost."""


def fit(ask: Ask, snapshot: Snapshot | None, up: Collection[str], paces: Mapping[str, float]) -> Fit:
    """`snapshot` is the scheduler's last, None if there is none; `up` the hosts that are still there.

    `paces`: base -> tokens a second of a host of it, all its residents together.
    """
    hosts = [host for host in snapshot.hosts if host.base == ask.base] if snapshot else []
    host = _warm(ask, [host for host in hosts if host.name in up])
    beside = len(host.residents) if host else 0
    pace = paces.get(ask.base)
    own = ask.tokens / pace if pace and ask.tokens is not None else None
    return Fit(
        _never(ask, snapshot, hosts),
        host.name if host else None,
        beside,
        BYTES_PER_PARAMETER * ask.adapter_parameters,
        ask.tokens,
        None if own is None else own * (beside + 1),
        None if own is None else own * ask.world_size,
    )


def _warm(ask: Ask, hosts: list[HostView]) -> HostView | None:
    """Of those that take it the one that the scheduler would choose."""
    free = [h for h in hosts if len(h.residents) < h.slots and h.takes(ask.adapter_parameters)]
    return max(free, key=inviting, default=None)


def _never(ask: Ask, snapshot: Snapshot | None, hosts: list[HostView]) -> str | None:
    if snapshot is None:
        return None
    on_gpus = snapshot.capacity.gpus > 0 or any(host.on_gpus for host in snapshot.hosts)
    free = snapshot.capacity.gpus if on_gpus else snapshot.capacity.cpus
    ranks = int(free) + sum(host.world_size for host in snapshot.hosts)
    if ask.world_size > ranks:
        return f"it needs {ask.world_size} ranks, and the cluster has {ranks}"
    if hosts and all(host.never_takes(ask.adapter_parameters) for host in hosts):
        most = max(host.adapter_room or 0 for host in hosts)
        size = f"its adapter has {ask.adapter_parameters:,} parameters"
        return f"{size}, and a host of its base has room for {most:,}"
    return None
