"""Rows of an arena: neighbours are one tensor, and what is given back costs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from workers.arena import ROWS, Arenas, Neighbours

LENGTH = 1 << 20
CPU = torch.device("cpu")


def rows(count, arenas=None):
    arenas = arenas or Arenas(CPU)
    return [arenas.take("weights", 1000, torch.float32) for _ in range(count)]


def parts(places):
    """A factor [2, 5] of each row."""
    return [place.values[30:40].view(2, 5) for place in places]


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_neighbours_in_an_arena_are_read_and_added_to_without_a_copy():
    places = rows(3)
    for number, place in enumerate(places):
        place.values.fill_(number)
    neighbours = Neighbours(parts(places))
    assert neighbours.all is not None
    assert torch.equal(neighbours.read(), torch.stack(parts(places)))
    assert neighbours.read().data_ptr() == parts(places)[0].data_ptr()
    neighbours.add(torch.full((3, 2, 5), 10.0))
    assert [int(part[1, 4]) for part in parts(places)] == [10, 11, 12]
    assert [int(place.values.sum()) for place in places] == [100, 1100, 2100]


@pytest.mark.parametrize("pick", [(0, 1, 3), (1, 0), (2, 1, 0), (0, 0)])
def test_rows_that_do_not_follow_one_another_are_copied_and_added_to_one_by_one(pick):
    held = rows(4)
    for number, place in enumerate(held):
        place.values.fill_(number)
    picked = parts([held[number] for number in pick])
    neighbours = Neighbours(picked)
    assert neighbours.all is None
    assert neighbours.read()[:, 0, 0].tolist() == list(pick)
    if len(set(pick)) == len(pick):
        neighbours.add(torch.ones(len(pick), 2, 5))
        assert [int(part[0, 0]) for part in picked] == [number + 1 for number in pick]


def test_factors_of_other_shapes_or_arenas_are_no_neighbours():
    first, second = rows(2)
    assert Neighbours([first.values[:10].view(2, 5), second.values[:10].view(5, 2)]).all is None
    assert Neighbours(parts([first, *rows(1)])).all is None


def test_a_row_that_is_given_back_is_zeros_for_the_next_owner_and_the_first_free_one_is_taken():
    arenas = Arenas(CPU)
    places = rows(3, arenas)
    for place in places:
        place.values.fill_(7)
    places[1].give_back()
    places[0].give_back()
    again = rows(2, arenas)
    assert [place.row for place in again] == [0, 1]
    assert not any(place.values.any() for place in again)
    assert bool((places[2].values == 7).all())


def test_more_rows_than_an_arena_has_lie_in_another_one():
    places = rows(ROWS + 1)
    assert len({place.order for place in places}) == ROWS + 1
    assert places[-1].order == (1, 0)


def test_only_rows_that_are_written_take_memory_and_giving_back_returns_it():
    arenas, before = Arenas(CPU), resident_bytes()
    places = [arenas.take("weights", LENGTH, torch.float32) for _ in range(8)]
    taken = resident_bytes() - before
    for place in places[:2]:
        place.values.fill_(1)
    written = resident_bytes() - before
    for place in places:
        place.give_back()
    assert taken < LENGTH
    assert 8 * LENGTH <= written < 12 * LENGTH
    assert resident_bytes() - before < LENGTH
