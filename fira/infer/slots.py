"""Which request has which slot of the cache, and what it need not read because a slot holds it."""
from __future__ import annotations

from collections.abc import Sequence

from fira.infer.cache import SlotCache, common_prefix
from fira.infer.progress import Progress

WORTH_WAITING = 16  # tokens another prompt must be about to read for us, to let it go ahead


class Slots:
    """The slots of a cache, lent to requests. `idle` stands in order of use, the oldest first."""

    def __init__(self, cache: SlotCache) -> None:
        self.cache = cache
        self.idle = list(range(len(cache.held)))

    @property
    def free(self) -> int:
        return len(self.idle)

    def take(self, prompt: Sequence[int], reuse: bool) -> tuple[int, int]:
        """An idle slot and how much of the prompt it holds already.

        The slot that begins alike is taken where it stands if nothing is lost by that; otherwise
        the one unused for longest, into which `begin` copies what any slot holds.
        """
        source, length = self.cache.best_prefix(prompt[:-1]) if reuse else (self.idle[0], 0)
        held = self.cache.held[source]
        stays = source in self.idle and (source == self.idle[0] or length == len(held))
        slot = source if stays else self.idle[0]
        self.idle.remove(slot)
        self.cache.held[slot] = held[:length] if stays else []
        return slot, len(self.cache.held[slot])

    def give_back(self, slot: int) -> None:
        """What the slot holds stays, for prompts that begin alike."""
        self.idle.append(slot)

    def forget(self) -> None:
        self.cache.held = [[] for _ in self.cache.held]

    def begin(self, one: Progress, reading: Sequence[Progress]) -> bool:
        """Copy the longest prefix of a prompt not begun. False: it waits for an earlier one.

        `reading` are the requests whose prompts are being read, the oldest first; so two prompts
        with a common beginning that come together read it once.
        """
        if one.begun:
            return True
        wanted = one.ids[:-1]  # the last token is read for its logits
        source, length = self.cache.best_prefix(wanted, besides=one.slot)
        length = max(length, one.read)
        for other in reading[:reading.index(one)]:
            if common_prefix(wanted, other.ids) >= length + WORTH_WAITING:
                return False
        if length > one.read:
            self.cache.copy(source, one.slot, length)
            one.read = one.cached = length
        one.begun = True
        return True
