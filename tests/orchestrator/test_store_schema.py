"""Migrations: made, taken over from before there were any, refused when newer; a server that goes away."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, text

from orchestrator.job import Reason, Status
from orchestrator.store import schema, tables
from orchestrator.store.engine import StoreUnreachable, parse
from orchestrator.store.store import Store
from tests.orchestrator.test_store import pipeline
from tests.postgres import Postgres, require
from workers.types import BadInput

LATER = ("boards", "scheduling", "controllers")


def made_before_migrations(url: str) -> None:
    """Today's tables without what the migrations after the first have brought, and a job in them."""
    engine = create_engine(parse(url))
    with closing(Store(url)) as store:
        store.submit(pipeline())
    with engine.begin() as db:
        for name in (*LATER, "alembic_version"):
            db.execute(text(f"DROP TABLE {name}"))
        if engine.dialect.name == "postgresql":
            db.execute(text("DROP FUNCTION refuse_change_of_events CASCADE"))
        else:
            for verb in ("UPDATE", "DELETE"):
                db.execute(text(f"DROP TRIGGER events_{verb}"))
        for index in (
            "ix_runs_token",
            "ix_requests_handled_at",
            "ix_metrics_pending",
            "ix_validations_pending",
        ):
            db.execute(text(f"DROP INDEX {index}"))
        db.execute(text("ALTER TABLE runs DROP COLUMN token"))
        db.execute(text("ALTER TABLE requests DROP COLUMN value"))
    engine.dispose()


def differences(url: str) -> list[object]:
    """Between the tables that are there and those that the code means."""
    engine = create_engine(parse(url))
    with engine.connect() as db:
        found = compare_metadata(MigrationContext.configure(db), tables.metadata)
    engine.dispose()
    return found


def test_migrations_lead_to_the_tables_that_the_code_means(store_url):
    Store(store_url).close()
    assert differences(store_url) == []


def test_store_from_before_migrations_is_taken_over_with_its_jobs(store_url):
    made_before_migrations(store_url)
    with closing(Store(store_url)) as store:
        assert [job.name for job in store.jobs()] == ["a", "both"]
        assert store.submit(pipeline()) == store.runs()[0].id
        store.switch_status(store.jobs()[0].id, Reason.PLACED)
        store.boards.show("hosts", [])
    assert differences(store_url) == []


def test_store_from_before_migrations_opened_by_many_at_once_is_migrated_once(store_url):
    made_before_migrations(store_url)

    def names(_: int) -> list[str]:
        with closing(Store(store_url)) as store:
            return [job.name for job in store.jobs()]

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(names, range(12))) == [["a", "both"]] * 12
    assert differences(store_url) == []


def test_store_of_a_newer_version_is_refused_in_one_sentence(store_url):
    Store(store_url).close()
    engine = create_engine(parse(store_url))
    with engine.begin() as db:
        db.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(BadInput, match="newer version of chorus"):
        Store(store_url)


def test_store_that_is_up_to_date_is_opened_without_alembic(store_url):
    Store(store_url).close()
    script = (
        "import sys; from orchestrator.store.store import Store; "
        f"Store({store_url!r}).close(); assert 'alembic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_head_is_the_newest_migration():
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", "orchestrator/store/migrations")
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_current_head() == schema.HEAD


@pytest.mark.parametrize("url", ["mysql://me:secret@somewhere/db", "chorus.db", "no such thing", ""])
def test_store_url_of_another_kind_is_refused_without_its_password(url):
    with pytest.raises(BadInput, match="CHORUS_STORE") as refused:
        Store(url)
    assert "secret" not in str(refused.value)


# ---- a server that goes away ----------------------------------------------------------------------------


@pytest.fixture
def server():
    require()
    postgres = Postgres("fsync=off")
    yield postgres
    postgres.close()


def test_store_whose_server_is_killed_and_comes_back_goes_on(server):
    with closing(Store(server.new_database(), patience=60.0)) as store:
        job = store.jobs(store.submit(pipeline()))[0].id
        server.kill()
        back = threading.Timer(0.3, server.start)
        back.start()
        placed = store.switch_status(job, Reason.PLACED, host="h1")
        back.join()
        assert (placed.status, placed.attempt) == (Status.STARTING, 1)
        assert [event.reason for event in store.events(job)] == [Reason.SUBMITTED, Reason.PLACED]


def test_store_whose_server_stays_away_says_so_after_its_patience(server):
    with closing(Store(server.new_database(), patience=0.2)) as store:
        server.kill()
        with pytest.raises(StoreUnreachable, match="the store does not answer"):
            store.submit(pipeline())
    with pytest.raises(StoreUnreachable):
        Store(server.url(), patience=0.0)
