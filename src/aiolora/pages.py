"""PagePool: the book of fixed-size pages. KV pages and adapter rank pages are the same idea and share it."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class PagePool:
    """Which of `num_pages` pages are owned, by how many, and what the idle ones still hold.

    A page is *owned* (refs > 0), *idle* (refs 0, but its contents have a key and can be found again) or *free*.
    Taking pages uses up the free ones first, then forgets the least recently used idle ones. Engine thread only.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._refs = [0] * num_pages
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._page_of_key: dict[bytes, int] = {}
        self._key_of_page: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """Pages that `take` can hand out now."""
        return len(self._free) + len(self._idle)

    def refs(self, page: int) -> int:
        return self._refs[page]

    def take(self, count: int) -> list[int] | None:
        """`count` pages with one owner each, or None (and no change) where there are not so many."""
        if count > self.num_available:
            return None
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._forget_oldest()
            self._refs[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more owner for each page, idle ones included."""
        for page in pages:
            self._refs[page] += 1
            self._idle.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """One owner fewer. The last pages become the least recently used: a chain is forgotten from its end."""
        for page in reversed(pages):
            assert self._refs[page] > 0, f"page {page} released twice"
            self._refs[page] -= 1
            if self._refs[page] == 0:
                if page in self._key_of_page:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def keep(self, page: int, key: bytes) -> None:
        """Remember that this owned page holds `key`; a second page with the same key stays unknown."""
        assert self._refs[page] > 0, f"page {page} is not owned"
        if key not in self._page_of_key and page not in self._key_of_page:
            self._page_of_key[key] = page
            self._key_of_page[page] = key

    def find(self, key: bytes) -> int | None:
        """The page that holds `key`; `share` it before anything is taken."""
        return self._page_of_key.get(key)

    def forget(self, key: bytes) -> None:
        """Let nobody find `key` any more; whoever owns its page keeps it."""
        page = self._page_of_key.pop(key, None)
        if page is None:
            return
        del self._key_of_page[page]
        if page in self._idle:
            del self._idle[page]
            self._free.append(page)

    def check(self) -> None:
        """Assert that free, idle and owned pages are disjoint and complete, and that both key maps agree."""
        free, idle = set(self._free), set(self._idle)
        owned = {page for page, refs in enumerate(self._refs) if refs > 0}
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & idle, "a page is both free and idle"
        assert not (free | idle) & owned, "an owned page is free or idle"
        assert len(free) + len(idle) + len(owned) == self.num_pages, "a page is lost"
        assert self._page_of_key == {key: page for page, key in self._key_of_page.items()}
        assert idle <= set(self._key_of_page), "an idle page has no key"
        assert not free & set(self._key_of_page), "a free page has a key"

    def _forget_oldest(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of_key[self._key_of_page.pop(page)]
        return page
