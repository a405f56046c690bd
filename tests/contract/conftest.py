"""The servers behind the registry's contract: MLflow on SQLite and on PostgreSQL."""

import pytest

from orchestrator.registry import server as tracking_server
from tests.contract.samples import HOMES, shared_server
from tests.postgres import postgres  # noqa: F401 (a fixture)


@pytest.fixture(scope="session")
def server_on_sqlite():
    return shared_server()


@pytest.fixture(scope="session")
def server_on_postgres(postgres, tmp_path_factory):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(tracking_server.STORE_VARIABLE, postgres.new_database())
        server = tracking_server.start(tmp_path_factory.mktemp("on-postgres"))
    HOMES[server.url] = server.home
    yield server
    server.stop()
