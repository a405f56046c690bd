"""What can go wrong with one job, and what then becomes of it."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from orchestrator.contracts import ClusterUnreachable, NoSuchVersion, RegistryUnreachable
from orchestrator.control.curve_export import Backoff
from orchestrator.control.ledger import LostFolder
from orchestrator.control.registration import GateFailed
from orchestrator.control.work import Work
from orchestrator.disk import is_full, scarce
from orchestrator.job import Reason
from orchestrator.store.engine import StoreUnreachable
from workers.types import BadInput, CheckpointsAway, Superseded

log = logging.getLogger(__name__)


class Guard:
    """`with guard(job):` what is done for a job, under which what it raises becomes the job's status."""

    def __init__(self, work: Work, registry_backoff: Backoff, home: Path) -> None:
        self._work = work
        self._backoff = registry_backoff
        self._home = home
        self._redone: set[str] = set()
        """Steps that were done again because what they made was gone."""

    @contextmanager
    def __call__(self, job: str) -> Generator[None]:
        """One job's failure is its own: it gets a status and a reason, and the loop goes on."""
        try:
            yield
        except (SQLAlchemyError, StoreUnreachable, ClusterUnreachable, Superseded):
            raise
        except RegistryUnreachable as error:
            self._backoff.failed()
            self._stop(job, Reason.REGISTRY_AWAY, f"{error}{scarce(self._home)}")
        except GateFailed as error:
            self._stop(job, Reason.GATE_FAILED, str(error))
        except (BadInput, NoSuchVersion) as error:
            self._stop(job, Reason.BAD_DATA, str(error))
        except LostFolder as error:
            self._redo(job, error)
        except CheckpointsAway as error:
            if job in self._work.jobs:
                self._work.pause(job, Reason.CHECKPOINTS_AWAY, str(error))
        except Exception as error:
            log.exception("job %s failed", job)
            if is_full(error) and job in self._work.jobs:
                self._work.disk_full(job, Path(getattr(error, "filename", None) or self._home), str(error))
            else:
                self._stop(job, Reason.INTERNAL_ERROR, f"{type(error).__name__}: {error}")

    def _stop(self, job: str, reason: Reason, message: str) -> None:
        if job in self._work.jobs:
            self._work.switch(job, reason, message)

    def _redo(self, job: str, lost: LostFolder) -> None:
        """Do a step again whose folder is gone: once, and only if it is the job's own."""
        own = lost.step in {step.id for step in self._work.order(job).job.steps}
        self._work.ledger.forget(lost)
        if own and lost.step not in self._redone:
            self._redone.add(lost.step)
            self._stop(job, Reason.WAITS_FOR_HOST, f"done again: {lost}")
        else:
            self._stop(job, Reason.INTERNAL_ERROR, f"{lost}; submit again to make it anew")
