"""The conversations on the addresses are the same each time, and what they state is so."""
from __future__ import annotations

import re

from fira.data import addresses


def test_conversations_repeat_and_their_turns_alternate():
    found = list(addresses.conversations())
    assert found == list(addresses.conversations()) and len(found) == addresses.NUMBER
    for talk in found:
        assert [one["role"] for one in talk] == ["user", "assistant"] * (len(talk) // 2)
        assert all(one["content"].strip() for one in talk)


def test_a_year_has_its_president_also_in_a_follow_up():
    known, follow_ups = {"1863": "Abraham Lincoln", "1934": "Franklin D. Roosevelt"}, 0
    for talk in addresses.conversations():
        for asked, said, *after in zip(talk[::2], talk[1::2], talk[2::2], talk[3::2], strict=False):
            year = re.search(r"(?:spoke in|address of) (\d{4})\?", asked["content"])
            if year:
                assert said["content"].startswith(f"In {year[1]} it was ")
                assert known.get(year[1], "") in said["content"]
            if year and after[0]["content"].startswith("And "):
                follow_ups += 1
                assert after[1]["content"].startswith(f"In {int(year[1]) + 1} it was ")
    assert follow_ups > 100
