"""Which pages of the cache are whose: handing out, sharing and taking back.

A page that is full can be found again by what it depends on: all tokens up to its end, and who may share it. Its name is a
hash of the name of the page before it and of its own tokens, so equal beginnings have equal names (as vLLM's automatic
prefix caching does). A page that nobody uses any more keeps its contents until its room is needed, the longest unused
first. A caller's salt goes into the first name: tenants with different salts share nothing, and cannot learn by the clock
what others have asked.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np


def page_names(ids: Sequence[int], num_pages: int, *, salt: str, page: int, ahead: int, known: list[bytes]) -> None:
    """Extends `known` to the names of the first `num_pages` pages of a text. ahead: further tokens that a page depends on."""
    while len(known) < num_pages:
        start = len(known) * page
        tokens = np.asarray(ids[start : start + page + ahead], dtype=np.int64).tobytes()
        before = known[-1] if known else _digest(salt.encode(errors="surrogatepass"), b"salt")
        known.append(_digest(before + tokens, b"page"))


def _digest(data: bytes, purpose: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16, person=purpose).digest()


class PagePool:
    """Numbers of pages. `num_free` counts those that can be had now, whether or not they still hold something.

    most_kept: pages that nobody uses and that may still be found; beyond, the longest unused is given away before a page
    that was never written, whose memory the system has not given yet.
    """

    def __init__(self, num_pages: int, most_kept: int | None = None):
        self.num_pages = num_pages
        self._most_kept = num_pages if most_kept is None else most_kept
        self._never_used = deque(range(num_pages))
        self._unused: OrderedDict[int, None] = OrderedDict()  # released, the longest unused first
        self._users = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._names_of: dict[int, list[bytes]] = {}

    @property
    def num_free(self) -> int:
        return len(self._never_used) + len(self._unused)

    def take(self) -> int:
        """A page of one's own; its contents are anything. There must be a free one."""
        is_empty = bool(self._unused) and next(iter(self._unused)) not in self._names_of
        if is_empty or not self._never_used or len(self._unused) > self._most_kept:
            page, _ = self._unused.popitem(last=False)
            self._forget(page)
        else:
            page = self._never_used.popleft()
        self._users[page] = 1
        return page

    def find(self, names: list[bytes]) -> list[int]:
        """The pages with these names, up to the first that is not there. They are shared from now on."""
        found = []
        for name in names:
            page = self._page_of.get(name)
            if page is None:
                break
            self._users[page] += 1
            self._unused.pop(page, None)
            found.append(page)
        return found

    def publish(self, page: int, name: bytes) -> None:
        """The page is full and can be found under this name too; of two with the same contents, the first is."""
        if name not in self._page_of:
            self._page_of[name] = page
            self._names_of.setdefault(page, []).append(name)

    def release(self, pages: list[int]) -> None:
        """One user less for each. The last of them are needed by the fewest, so their room is given away first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                self._unused[page] = None
                if page not in self._names_of:  # nothing to be found in it
                    self._unused.move_to_end(page, last=False)

    def forget_all(self) -> None:
        """Nothing is found again: the weights have changed."""
        self._page_of.clear()
        self._names_of.clear()

    def _forget(self, page: int) -> None:
        for name in self._names_of.pop(page, ()):
            del self._page_of[name]
