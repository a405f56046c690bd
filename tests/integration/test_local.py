"""What is particular to the cluster without Ray."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.cluster.local import LocalCluster
from tests.integration.conftest import poll_until
from workers.types import BadInput, HostFailed


def test_local_two_ranks_are_refused_with_a_way_out(base):
    with pytest.raises(BadInput, match=r"world_size is 2.*set it to 1 or use Ray"):
        LocalCluster().start_host("host", base, world_size=2)


def test_local_base_that_is_no_model_fails_with_the_users_sentence_and_gives_room_back(base):
    cluster = LocalCluster()
    cluster.start_host("host", replace(base, path="nowhere"), world_size=1)
    assert cluster.capacity().cpus == 0.0
    (failed,) = poll_until(cluster, "host", lambda event: isinstance(event, HostFailed))
    assert failed.message.startswith("base_model: nowhere has no config.json")
    assert cluster.poll("host") == ()
    assert cluster.capacity().cpus == 1.0
