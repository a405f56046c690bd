"""A server that goes away at any request of a move: asked again, the move is made once and recorded whole."""

import http.client

import pytest
from mlflow.tracking import MlflowClient

from orchestrator.contracts import RegistryConflict, RegistryUnreachable
from orchestrator.registry import promotion
from orchestrator.registry.registry import MlflowRegistry
from tests.contract.samples import fresh_name, new_version, shared_server

MOST = 40


@pytest.fixture(scope="module")
def registry():
    return MlflowRegistry(shared_server().url)


class Away:
    """The server of this process's requests: it does the n-th writing one and is gone before it answers."""

    def __init__(self, patch):
        self.left, self.gone = 0, False
        begin, answer = http.client.HTTPConnection.putrequest, http.client.HTTPConnection.getresponse

        def putrequest(connection, method, *rest, **named):
            connection.last = False
            if self.left and method != "GET":
                self.left -= 1
                connection.last = self.left == 0
                self.gone = connection.last
            if self.gone and not connection.last:
                raise ConnectionRefusedError("away")
            return begin(connection, method, *rest, **named)

        def getresponse(connection):
            found = answer(connection)
            if connection.last:
                found.read()
                raise ConnectionResetError("away")
            return found

        patch.setattr(http.client.HTTPConnection, "putrequest", putrequest)
        patch.setattr(http.client.HTTPConnection, "getresponse", getresponse)
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def call(self, number, call):
        """Whether it went away meanwhile."""
        self.left = number
        try:
            call()
        except RegistryUnreachable:
            return True
        finally:
            self.gone, self.left = False, 0
        return False


@pytest.fixture
def away(monkeypatch):
    return Away(monkeypatch)


def two_versions(registry, folder):
    name = fresh_name()
    for seed in (1, 2):
        registry.register(new_version(registry, folder / name, name, f"step-{seed}", seed, scores=[]))
    registry.promote(name, 1, None, "first", {})
    return name


def moves(registry, name):
    client = MlflowClient(registry.url)
    experiment = client.get_experiment_by_name("releases").experiment_id
    runs = client.search_runs(
        [experiment], f"tags.`release.name` = '{name}'", order_by=["attributes.start_time ASC"]
    )
    return [(r.data.tags["release.from"], r.data.tags["release.to"], r.info.status) for r in runs]


FIRST, SECOND = ("0", "1", "FINISHED"), ("1", "2", "FINISHED")


@pytest.mark.parametrize("verb", ["promote", "rollback"])
def test_move_unanswered_at_each_request_and_asked_again_is_made_once(registry, away, tmp_path, verb):
    name = two_versions(registry, tmp_path)
    registry.promote(name, 2, 1, "better", {})
    expected, champion = [FIRST, SECOND], 2
    for number in range(1, MOST):
        target = 3 - champion

        def move(target=target, champion=champion):
            if verb == "promote":
                registry.promote(name, target, champion, "better", {"macro_f1": 0.9})
            else:
                registry.rollback(name, champion, "worse")

        went_away = away.call(number, move)
        move()
        expected.append((str(champion), str(target), "FINISHED"))
        assert moves(registry, name) == expected, number
        assert registry.version(name, "champion").version == target
        assert registry.version(name, "previous").version == champion
        champion = target
        if not went_away:
            break
    assert number > 4


def test_move_carried_out_late_does_not_undo_the_moves_after_it(registry, tmp_path, monkeypatch):
    """Without a common lock: another writer finishes the move and makes the next before the first wakes."""
    name = two_versions(registry, tmp_path)
    registry.register(new_version(registry, tmp_path, name, "step-3", 3, scores=[]))
    other, set_alias, late = MlflowRegistry(registry.url), MlflowClient.set_registered_model_alias, []

    def overtaken(client, *arguments):
        if not late:
            late.append(arguments)
            with pytest.raises(RegistryConflict):
                other.promote(name, 3, 1, "at the same time", {})
            other.promote(name, 3, 2, "after it", {})
        return set_alias(client, *arguments)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", overtaken)
    assert registry.promote(name, 2, 1, "slow", {}).version == 2
    assert registry.version(name, "champion").version == 3
    assert registry.version(name, "previous").version == 2
    assert [(r.source, r.target, r.done) for r in registry.history(name)] == [
        (0, 1, True),
        (1, 2, True),
        (2, 3, True),
    ]
    assert registry.audit(name) == []


def test_move_whose_record_was_written_twice_is_made_once(registry, tmp_path, monkeypatch):
    """MLflow's client repeats a request that was not answered: of two records one ends as not made."""
    name = two_versions(registry, tmp_path)
    create, twice = MlflowClient.create_run, []

    def repeated(client, *arguments, **named):
        if not twice:
            twice.append(create(client, *arguments, **named))
        return create(client, *arguments, **named)

    monkeypatch.setattr(MlflowClient, "create_run", repeated)
    assert registry.promote(name, 2, 1, "better", {}).version == 2
    assert sorted(moves(registry, name)) == [FIRST, ("1", "2", "FAILED"), SECOND]
    assert [(r.source, r.target, r.done) for r in registry.history(name)] == [(0, 1, True), (1, 2, True)]


def test_move_asked_again_answers_with_its_own_version_though_the_champion_moves_on(
    registry, tmp_path, monkeypatch
):
    name = two_versions(registry, tmp_path)
    other, look = MlflowRegistry(registry.url), promotion._champion

    def overtaken(*arguments):
        found = look(*arguments)
        monkeypatch.setattr(promotion, "_champion", look)
        other.promote(name, 2, 1, "better", {})
        return found

    monkeypatch.setattr(promotion, "_champion", overtaken)
    assert registry.promote(name, 1, None, "first", {}).version == 1
    assert registry.version(name, "champion").version == 2
