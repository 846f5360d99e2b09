"""Limits, classes, days, and how a pool takes them over: the plain cases, by hand. (Sequences: test_twins.py.)"""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
import redis

from stable_openai import INJECTED, ConfigurationError, Exhausted, Key, KeyManager, Limits, stable
from stable_openai._limits import class_of, day_starts, quota
from tests.faults.servers import until

HOUR_MS = 3_600_000


@pytest.mark.parametrize(("day", "hours"), [("2026-03-08", 23), ("2026-11-01", 25), ("2026-06-01", 24)])
def test_days_have_as_many_hours_as_the_zone_gives_them(day: str, hours: int) -> None:
    noon = datetime.fromisoformat(f"{day}T12:00").replace(tzinfo=ZoneInfo("America/New_York"))
    now_ms = int(noon.timestamp() * 1000)
    starts = day_starts("America/New_York", now_ms)
    start, finish = next((start, finish) for start, finish in pairwise(starts) if start <= now_ms < finish)
    assert (finish - start) / HOUR_MS == hours
    assert starts[0] <= now_ms - 12 * HOUR_MS, "a store's clock that is behind still finds its day"
    assert starts[-1] > now_ms + 6 * 24 * HOUR_MS


def test_a_class_is_the_exact_entry_else_the_first_pattern_else_the_model() -> None:
    classes = {"gpt-4o*": Limits(rpm=1), "gpt-4o-mini": Limits(rpm=2), "gpt-*": Limits(rpm=3)}
    models = ["gpt-4o-mini", "gpt-4o-2026", "gpt-5", "o9"]
    assert [class_of(model, classes) for model in models] == ["gpt-4o-mini", "gpt-4o*", "gpt-*", "o9"]


def test_limits_go_over_others_field_by_field() -> None:
    assert Limits(rpm=1, rule="sliding").over(Limits(rpm=5, tpm=7)) == Limits(rpm=1, tpm=7, rule="sliding")


@pytest.mark.parametrize(
    ("limits", "capacity"),
    [
        (Limits(rpm=60), 59),  # one less, for what arrives together
        (Limits(rpm=6000), 5975),  # a quarter of a second's refill less
        (Limits(rpm=1), 1),  # never so much that not one request fits
        (Limits(rpm=60, burst_s=1), 1),
        (Limits(rpm=600, burst_s=2), 17),
    ],
)
def test_a_bucket_leaves_out_what_the_headroom_needs(limits: Limits, capacity: int) -> None:
    assert quota(limits, 0.25)[2:6] == (1, limits.rpm, limits.rpm / 60_000 if limits.rpm else 0, capacity)


def test_a_sliding_window_is_longer_by_the_headroom_and_a_calendar_ends_sooner() -> None:
    assert quota(Limits(rpm=9, rule="sliding"), 0.25)[2:6] == (2, 9, 60_250, 313)
    assert quota(Limits(rpd=9, rule="bucket", day_rule="calendar"), 0.25)[6:10] == (3, 9, 250, 0)


def served(manager: KeyManager, model: str | None, count: int) -> Counter[str]:
    """By which keys a number of requests are served."""
    names = []
    for _ in range(count):
        with manager.lease(model=model, max_wait=0) as lease:
            names.append(lease.key.name)
    return Counter(names)


@pytest.fixture(params=["memory", "redis"])
def where(request: pytest.FixtureRequest, redis_url: str) -> str | None:
    return redis_url if request.param == "redis" else None


def test_a_key_serves_only_its_models_and_a_weight_counts(where: str | None) -> None:
    keys = [
        Key("sk-1", name="all", weight=1),
        Key("sk-2", name="heavy", weight=3),
        Key("sk-3", name="mini", models=["*-mini"]),
    ]
    manager = KeyManager(keys, where, pool="test-models")
    assert served(manager, "gpt-4o", 8) == {"all": 2, "heavy": 6}
    assert served(manager, "gpt-4o-mini", 10) == {"all": 2, "heavy": 6, "mini": 2}
    manager.remove("all")
    manager.remove("heavy")
    with pytest.raises(ConfigurationError, match="gpt-4o"), manager.lease(model="gpt-4o"):
        pass
    manager.close()


def test_keys_of_one_account_share_its_limits_and_take_turns(where: str | None) -> None:
    keys = [Key(f"sk-{number}", name=f"k{number}", account="org") for number in range(3)]
    manager = KeyManager(keys, where, pool="test-shared", limits=Limits(rpm=7, rule="sliding"))
    assert served(manager, None, 6) == {"k0": 2, "k1": 2, "k2": 2}
    assert served(manager, None, 1)
    with pytest.raises(Exhausted):
        served(manager, None, 1)
    manager.close()


def test_in_a_rolling_deploy_the_last_limits_win_and_what_is_used_stays_used(redis_url: str) -> None:
    old = KeyManager(["sk-a"], redis_url, pool="test-deploy", limits=Limits(rpm=10, rule="sliding"))
    served(old, "m", 4)
    new = KeyManager(["sk-a"], redis_url, pool="test-deploy", limits=Limits(rpm=6, rule="sliding"))
    served(new, "m", 1)
    served(old, "m", 1)  # the worker of the old release goes on, under the new limits
    with pytest.raises(Exhausted):
        served(old, "m", 1)
    again = KeyManager(["sk-a"], redis_url, pool="test-deploy", limits=Limits(rpm=10, rule="sliding"))
    served(again, "m", 4)  # rolled back: the old limits win again
    with pytest.raises(Exhausted):
        served(new, "m", 1)
    for manager in (old, new, again):
        manager.close()


def test_who_declares_no_limits_leaves_those_of_others(redis_url: str) -> None:
    """A program with the same keys and nothing else looks at the pool, then calls: the limits stay, and count."""
    declared = Limits(rpm=2, tpm=100, rule="sliding")
    service = KeyManager(["sk-a"], redis_url, pool="test-deploy", limits=declared)
    served(service, "m", 1)
    shell = KeyManager(["sk-a"], redis_url, pool="test-deploy")
    assert meters(shell) == {("m", "rpm"): (1, 2), ("m", "tpm"): (0, 100)}
    shell.check()
    with shell.lease(model="m", tokens=60):
        pass
    assert meters(service) == meters(shell) == {("m", "rpm"): (2, 2), ("m", "tpm"): (60, 100)}
    for manager in (service, shell):
        with pytest.raises(Exhausted):
            served(manager, "m", 1)
        manager.close()


def test_a_program_without_limits_counts_the_tokens_that_others_limit(redis_url: str) -> None:
    shell = KeyManager(["sk-a"], redis_url, pool="test-deploy")

    @stable(manager=shell, model="m")
    def ask(messages: list[dict[str, str]], api_key: str = INJECTED) -> None:
        pass

    service = KeyManager(["sk-a"], redis_url, pool="test-deploy", limits=Limits(tpm=10_000))
    served(service, "m", 1)
    ask([{"role": "user", "content": "How many? " * 100}])
    assert meters(service)["m", "tpm"][0] > 100
    for manager in (service, shell):
        manager.close()


def meters(manager: KeyManager) -> dict[tuple[str, str], tuple[float, int]]:
    (key,) = manager.status().keys
    return {(row.model_class, row.limit): (row.used, row.of) for row in key.meters}


@pytest.mark.parametrize("where", [None, "redis"])
def test_a_look_sees_keys_that_serve_none_of_the_models_used(where: str | None, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("redis_url") if where else None
    keys = [Key("sk-a", name="all"), Key("sk-b", name="few", models=["o3"])]
    manager = KeyManager(keys, url, pool="test-deploy", limits=Limits(rpm=6))
    served(manager, "m", 1)
    manager.disable("few")
    every, few = manager.status().keys
    assert (every.state, every.live, [(row.model_class, row.of) for row in every.meters]) == ("ready", 0, [("m", 6)])
    assert (few.state, few.meters) == ("disabled", ())
    manager.close()


def test_a_look_changes_nothing(redis_url: str) -> None:
    """Nor does the one who looks come into the pool. Before its first call a pool is as it is declared."""
    roster, of_class = "stable:{test-deploy}:roster", "stable:{test-deploy}:class:m"
    with redis.Redis.from_url(redis_url) as store:
        manager = KeyManager(["sk-a"], redis_url, pool="test-deploy", limits=Limits(rpm=6))
        assert meters(manager) == {("-", "rpm"): (0, 6)}
        assert store.keys("stable:{test-deploy}*") == []
        served(manager, "m", 1)
        until(lambda: store.zcard(roster) == 2)  # and when it changed
        before = store.dump(of_class)
        other = KeyManager(["sk-a"], redis_url, pool="test-deploy", limits=Limits(rpm=7))
        assert {name: of for name, (_, of) in meters(other).items()} == {("m", "rpm"): 6}
        assert (store.dump(of_class), store.zcard(roster)) == (before, 2)
        assert sorted(key.rpartition(b":")[2] for key in store.keys("*class:*")) == [b"m"]
        other.close()
        manager.close()
