"""pytest tests/engine/test_blocks.py"""

from __future__ import annotations

import random

import pytest

from minga.engine.blocks import PagePool, page_names


@pytest.fixture(autouse=True)
def forward_pass() -> None:
    """No model takes part."""


def names(ids: list[int], num_pages: int, *, salt: str = "", ahead: int = 0) -> list[bytes]:
    known: list[bytes] = []
    page_names(ids, num_pages, salt=salt, page=4, ahead=ahead, known=known)
    return known


def test_equal_beginnings_have_equal_names():
    one, other = names([1, 2, 3, 4, 5, 6, 7, 8], 2), names([1, 2, 3, 4, 5, 6, 7, 9], 2)
    assert one[0] == other[0] and one[1] != other[1]
    assert names([9, 2, 3, 4, 5, 6, 7, 8], 2)[1] != one[1]  # what came before counts
    assert names([1, 2, 3, 4, 5, 6, 7, 8], 2, salt="a")[0] != one[0]
    assert names([1, 2, 3, 4, 5], 1, ahead=1) != names([1, 2, 3, 4, 6], 1, ahead=1)
    known = one[:1]
    page_names([1, 2, 3, 4, 5, 6, 7, 8], 2, salt="", page=4, ahead=0, known=known)
    assert known == one


def test_a_page_is_shared_while_it_is_used_and_found_after():
    pool = PagePool(3)
    page = pool.take()
    pool.publish(page, b"x")
    assert pool.find([b"x", b"y"]) == [page] and pool.num_free == 2
    pool.release([page])
    assert pool.num_free == 2  # the other user has it still
    pool.release([page])
    assert pool.num_free == 3 and pool.find([b"x"]) == [page]


def test_what_holds_nothing_is_taken_first_then_the_longest_unused():
    pool = PagePool(4)
    pages = [pool.take() for _ in range(4)]
    for page, name in zip(pages[:3], (b"a", b"b", b"c"), strict=True):
        pool.publish(page, name)
    pool.release([pages[1]])
    pool.release([pages[0]])
    pool.release([pages[3]])  # nameless
    assert [pool.take(), pool.take()] == [pages[3], pages[1]]
    assert pool.find([b"a"]) == [pages[0]] and pool.find([b"b"]) == []


def test_the_end_of_a_text_is_given_away_before_its_beginning():
    pool = PagePool(3)
    pages = [pool.take() for _ in range(3)]
    for page, name in zip(pages, (b"a", b"b", b"c"), strict=True):
        pool.publish(page, name)
    pool.release(pages)
    assert pool.take() == pages[2]
    assert pool.find([b"a", b"b", b"c"]) == pages[:2]


def test_forgetting_finds_nothing_and_loses_nothing():
    pool = PagePool(2)
    page = pool.take()
    pool.publish(page, b"a")
    pool.forget_all()
    pool.release([page])
    assert pool.find([b"a"]) == [] and pool.num_free == 2
    assert {pool.take(), pool.take()} == {0, 1}


def test_nothing_is_ever_lost_or_given_twice():
    """2,000 random moves of texts that share their beginnings."""
    rng, pool = random.Random(0), PagePool(12)
    held: list[list[int]] = []
    for _ in range(2000):
        if held and (rng.random() < 0.5 or pool.num_free < 4):
            pool.release(held.pop(rng.randrange(len(held))))
        else:
            text = [b"%d-%d" % (rng.randrange(3), 0), b"%d-%d" % (rng.randrange(3), 1)]
            found = pool.find(text)
            mine = [pool.take() for _ in range(4 - len(found)) if pool.num_free]
            for page, name in zip(mine, text[len(found) :], strict=False):
                pool.publish(page, name)
            held.append(found + mine)
        used = {page for pages in held for page in pages}
        assert len(used) + pool.num_free == 12
        assert all(len(set(pages)) == len(pages) for pages in held)
