from __future__ import annotations

import pytest

from kp_runtime.errors import InputError
from kp_runtime.feeding import TRIES, WAYS, Feeder

COST = {"whole": 3.0, "by 4": 2.0, "one by one": 4.0, "side by side": 2.5}


def feed(feeder: Feeder, faces: int, calls: int, cost: dict[str, float]) -> list[str]:
    used = []
    for _ in range(calls):
        way = feeder.next(faces)
        used.append(way.name)
        feeder.record(faces, way, cost[way.name] * faces)
    return used


def test_every_way_is_tried_and_the_fastest_kept() -> None:
    feeder = Feeder(WAYS)
    trial = len(WAYS) * (TRIES + 1)
    assert not feeder.decided(8)
    used = feed(feeder, 8, trial + 10, COST)
    assert {used[:trial].count(way.name) for way in WAYS} == {TRIES + 1}
    assert set(used[trial:]) == {"by 4"}
    assert feeder.decided(8)
    assert list(feeder.times()[8]) == ["by 4", "side by side", "whole", "one by one"]
    assert feeder.times()[8]["by 4"] == pytest.approx(2000)


def test_the_first_call_of_a_way_does_not_count() -> None:
    """It makes memory and threads ready."""
    feeder = Feeder(WAYS)
    slow = {name: 100.0 if name == "by 4" else cost for name, cost in COST.items()}
    feed(feeder, 8, len(WAYS), slow)
    assert feed(feeder, 8, len(WAYS) * TRIES + 1, COST)[-1] == "by 4"
    feed(feeder, 16, len(WAYS), dict.fromkeys(COST, 0.1))
    feed(feeder, 16, len(WAYS), COST)
    assert feeder.times()[16]["by 4"] == pytest.approx(2000)


def test_sizes_are_chosen_apart() -> None:
    feeder = Feeder(WAYS)
    feed(feeder, 8, 40, COST)
    feed(feeder, 5, 1, COST)  # of the group up to 8
    assert not feeder.decided(16)
    assert feeder.decided(7)
    other = COST | {"whole": 1.0}
    assert feed(feeder, 16, 40, other)[-1] == "whole"
    assert feed(feeder, 8, 1, other) == ["by 4"]


def test_parts_that_hold_all_are_not_tried() -> None:
    feeder = Feeder(WAYS)
    assert [way.name for way in feeder.ways(2)] == ["whole", "one by one", "side by side"]
    assert [way.name for way in feeder.ways(4)] == ["whole", "one by one", "side by side"]
    assert [way.name for way in feeder.ways(5)] == [way.name for way in WAYS]


def test_a_way_that_does_not_work_is_dropped() -> None:
    feeder = Feeder(WAYS)
    feed(feeder, 8, 40, COST | {"side by side": 1.0})
    feeder.settle(16, "side by side")
    feeder.drop(WAYS[-1])
    assert feeder.next(8).name == "by 4"
    assert feeder.next(16).name != "side by side"
    assert "side by side" not in [way.name for way in feeder.ways(32)]


def test_one_slow_call_does_not_change_the_choice() -> None:
    feeder = Feeder(WAYS)
    feed(feeder, 8, 40, COST)
    feed(feeder, 8, 5, COST | {"by 4": 50.0})
    assert feeder.next(8).name == "by 4"


def test_a_way_that_was_chosen_before_is_not_measured() -> None:
    feeder = Feeder(WAYS)
    feeder.settle(8, "one by one")
    assert feeder.decided(5)
    assert not feeder.decided(16)
    assert set(feed(feeder, 8, 30, COST)) == {"one by one"}
    with pytest.raises(InputError, match="no way 'by 3' to feed a batch; choose from whole, by 4, one by one"):
        feeder.settle(8, "by 3")
