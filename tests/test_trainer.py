"""The list of packs that training groups share: who gets what, and what becomes of the work of a group that dies."""

from selfguide_ray.models import Pack
from selfguide_ray.trainer import DEATHS, STARTS, WorkList

BIG = Pack((("a", "0"), ("b", "0")), 20)
SMALL = Pack((("c", "1"),), 5)


def test_packs_are_handed_out_once_in_order():
    works = WorkList([BIG, SMALL])
    assert works.begin(0, 1)
    assert works.begin(1, 1)
    assert (works.take(0), works.take(1), works.take(0), works.take(1)) == (BIG, SMALL, None, None)
    assert works.left() == (0, [])


def test_what_a_dead_group_had_in_hand_comes_first_again():
    works = WorkList([BIG, SMALL])
    works.begin(0, 1)
    assert works.take(0) == BIG
    works.release(0)
    works.begin(1, 1)
    assert (works.take(1), works.take(1)) == (BIG, SMALL)
    works.release(0)  # it has nothing any more
    assert works.left() == (0, [])


def test_a_pack_that_kills_its_groups_is_trained_task_by_task_and_a_task_not_at_all():
    works = WorkList([BIG, SMALL])
    for _ in range(DEATHS):
        works.begin(0, 1)
        assert works.take(0) == BIG
        works.starts.clear()
    works.begin(1, 1)
    works.release(0)
    taken = [works.take(1) for _ in range(3)]
    assert taken == [SMALL, *BIG.split()]
    for _ in range(DEATHS - 1):
        works.begin(1, 1)
        works.starts.clear()
        assert works.take(1) == BIG.split()[1]
    works.begin(1, 1)
    assert works.left() == (0, ["b"])
    assert works.take(1) is None


def test_a_group_that_dies_before_it_has_done_anything_stops_starting():
    works = WorkList([SMALL])
    assert [works.begin(0, 1) for _ in range(STARTS + 1)] == [True] * STARTS + [False]
    assert works.waiting == [SMALL]
    assert works.left() == (0, [])  # no other group would fare better


def test_a_finished_pack_starts_the_count_anew():
    works = WorkList([BIG, SMALL])
    for _ in range(STARTS):
        assert works.begin(0, 1)
    works.take(0)
    works.take(0)
    assert works.begin(0, 1)


def test_a_resized_group_blames_nobody():
    works = WorkList([BIG])
    for workers in (2, 1, 2, 1, 2, 1, 2):
        assert works.begin(0, workers)
        assert works.take(0) == BIG
    assert not works.deaths[BIG.name]
