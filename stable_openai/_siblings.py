"""Keys that share one quota without anybody having declared it: the organisation that responses name tells.

OpenAI's limits belong to the organisation and project. Keys of one organisation that are no declared account's are
treated as one where one of them is refused; each worker sees that by itself, from the first response to each key.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from stable_openai._keys import Key

__all__ = ["Siblings"]

log = logging.getLogger("stable_openai.keys")
MOST = 16  # of one organisation, and
ORGANIZATIONS = 1000


class Siblings:
    """Which keys have answered for which organisation.

    Args:
        known: the keys of the worker, by fingerprint.
    """

    def __init__(self, pool: str, known: Mapping[str, Key]) -> None:
        self._pool, self._known = pool, known
        self._organizations: dict[str, tuple[str, ...]] = {}
        self._told: set[str] = set()

    def of(self, fingerprint: str, organization: str) -> tuple[str, ...]:
        """A key has answered for an organisation: the accounts that share it, other than its own."""
        key = self._known.get(fingerprint)
        if key is None or key.account != key.fingerprint or not _is_name(organization):
            return ()
        found = self._organizations.get(organization, ())
        if key.account not in found:
            if len(found) >= MOST or (not found and len(self._organizations) >= ORGANIZATIONS):
                return ()
            found = self._organizations[organization] = (*found, key.account)
            if len(found) > 1 and not self._told.issuperset(found):
                self._told.update(found)
                names = ", ".join(sorted(self._known[account].name for account in found if account in self._known))
                log.warning(
                    "keys.share_account pool=%s keys=%s: they answer for one organisation and share its limits; "
                    "write Key(..., account=%r) for each",
                    self._pool,
                    names,
                    organization,
                )
        return tuple(account for account in found if account != key.account)

    def organization(self, account: str) -> str:
        """The organisation that an account shares with others; "": none that is known."""
        return next(
            (name for name, accounts in self._organizations.items() if account in accounts and len(accounts) > 1), ""
        )


def _is_name(text: str) -> bool:
    return isinstance(text, str) and 0 < len(text) <= 128 and text.isascii() and text.isprintable()
