"""Who is asked: the base, or one of many tenants, evenly or by Zipf's law."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from spallm_serve.benchmarks.serve_client import Ask, Target

PROMPT_TOKENS = 32
# Ids below are special in most vocabularies.
_FIRST_TOKEN = 3

Choice = Literal["base", "uniform", "zipf"]


@dataclass(frozen=True)
class Mixture:
    """Of which requests consist.

    Attributes:
        tenants: distinct ones, each with an adapter of its own; 0 is the base alone.
        choice: how each request's tenant is chosen. By ``zipf`` the tenant of rank k is asked
            1/k times as often as the first.
    """

    tenants: int
    choice: Choice


def mixtures(tenants: Sequence[int]) -> list[Mixture]:
    """All that are measured for numbers of tenants; one tenant can be chosen in one way only."""
    found = []
    for count in tenants:
        if count == 0:
            found.append(Mixture(0, "base"))
        else:
            found.append(Mixture(count, "uniform"))
            if count > 1:
                found.append(Mixture(count, "zipf"))
    return found


def chosen(mixture: Mixture, count: int, seed: int) -> list[int]:
    """The tenants of ``count`` requests, as places among all of them."""
    places = range(mixture.tenants)
    weights = [1 / (place + 1) if mixture.choice == "zipf" else 1.0 for place in places]
    return random.Random(seed).choices(places, weights, k=count)


class Asking:
    """Makes requests; no two have the same prompt, so that no cache of prefixes helps.

    Args:
        base: for the base itself.
        adapters: one for each tenant.
        vocabulary: tokens that a prompt may have.
    """

    def __init__(self, base: Target, adapters: Sequence[Target], vocabulary: int) -> None:
        self._base, self._adapters, self._vocabulary = base, adapters, vocabulary
        self._random = random.Random(0)

    def of(self, target: Target) -> Ask:
        """A request to one."""
        prompt = [
            self._random.randrange(_FIRST_TOKEN, self._vocabulary) for _ in range(PROMPT_TOKENS)
        ]
        return Ask(target, prompt)

    def everybody(self) -> Iterator[Ask]:
        """A request to the base and to each adapter."""
        yield from (self.of(target) for target in (self._base, *self._adapters))

    def mixed(self, mixture: Mixture, count: int, seed: int) -> Iterator[Ask]:
        """Requests of a mixture; the same seed chooses the same tenants."""
        if mixture.tenants == 0:
            yield from (self.of(self._base) for _ in range(count))
        else:
            for place in chosen(mixture, count, seed):
                yield self.of(self._adapters[place])
