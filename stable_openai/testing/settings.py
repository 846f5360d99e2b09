"""What a fake upstream is told when it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from .limits import Account, Limit
from .meters import SECOND_NS
from .refusals import RateHeaders


@dataclass(frozen=True, eq=False)
class Settings:
    """The arguments of `FakeOpenAI` and `FakeProcess`.

    keys: secret -> account, the owner of limits; or secrets, each its own account. Others are answered 401.
    limits: of every account for each model.
    account_limits: of an account, in place of all others.
    models: of the models that match a pattern, in place of `limits`; they share one set of meters an account.
        An exact name goes before patterns, those in the order given.
    minute_s, day_s: the lengths of the windows, for tests that cannot wait for a minute.
    latency_s: seconds before an answer, or a function that returns them, called in the server's thread.
    output_tokens: tokens of an answer, or a function of the request's JSON; at most the request's limit.
    charge: "reserved" charges a request on arrival, as OpenAI does, with the larger of its output limit (times
        `n`), if it gives one, and the estimate of its prompt (a quarter of its characters); "used" holds as
        many until the answer, then charges what was used.
    refusals_count: a refused request consumes a request wherever there is one left.
    unknown_models: answered 404 `model_not_found`.
    organizations: account -> what `openai-organization` names in the answers to its keys, in place of the account;
        "" for no such header.
    rate_headers: what answers tell of limits. "openai": of the minute's, or of the day's where there is none, with
        their resets. "groq": of the requests of a day and of the tokens of a minute. "azure": as openai, without
        resets. "none": nothing. Refusals tell their wait all the same.
    gzip: whether answers are compressed for clients that accept it; a stream so that each event can be decoded as it
        comes.
    """

    keys: Mapping[str, str] | Iterable[str] = field(repr=False)
    limits: Limit = field(default_factory=Limit)
    account_limits: Mapping[str, Limit] = field(default_factory=dict)
    models: Mapping[str, Limit] = field(default_factory=dict)
    minute_s: float = 60.0
    day_s: float = 86_400.0
    latency_s: float | Callable[[], float] = 0.0
    output_tokens: int | Callable[[dict[str, Any]], int] = 16
    charge: Literal["reserved", "used"] = "reserved"
    refusals_count: bool = False
    unknown_models: Iterable[str] = ()
    organizations: Mapping[str, str] | None = None
    rate_headers: RateHeaders = "openai"
    gzip: bool = False
    host: str = "127.0.0.1"
    port: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.keys, str):
            raise TypeError("keys is a mapping or an iterable of secrets, not a string")
        if self.charge not in ("reserved", "used"):
            raise ValueError(f"charge is 'reserved' or 'used', not {self.charge!r}")
        if self.rate_headers not in get_args(RateHeaders):
            raise ValueError(f"rate_headers is one of {', '.join(get_args(RateHeaders))}, not {self.rate_headers!r}")

    def accounts(self) -> dict[str, str]:
        """The account of every secret."""
        return dict(self.keys) if isinstance(self.keys, Mapping) else {secret: secret for secret in self.keys}

    def organization(self, account: str) -> str:
        """What the answers to an account name as their organisation; "" for nothing."""
        return (self.organizations or {}).get(account, account)

    def model_class(self, model: str) -> str:
        """The pattern that the model's meters belong to, or the model itself."""
        if model in self.models:
            return model
        return next((pattern for pattern in self.models if fnmatchcase(model, pattern)), model)

    def meters(self, account: str, model_class: str) -> Account:
        """New meters of an account for a class."""
        limit = self.account_limits.get(account) or self.models.get(model_class) or self.limits
        return Account(limit, round(self.minute_s * SECOND_NS), round(self.day_s * SECOND_NS))

    def to_json(self) -> dict[str, Any]:
        """As JSON's types. Raises TypeError where a setting is a function."""
        if callable(self.latency_s) or callable(self.output_tokens):
            raise TypeError("a fake in another process takes numbers, not functions")
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {
            "keys": self.accounts(),
            "limits": asdict(self.limits),
            "account_limits": {account: asdict(limit) for account, limit in self.account_limits.items()},
            "models": {pattern: asdict(limit) for pattern, limit in self.models.items()},
            "unknown_models": list(self.unknown_models),
            "organizations": None if self.organizations is None else dict(self.organizations),
        }


def from_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a fake, from what `Settings.to_json` made."""

    def limits(mapping: Mapping[str, Any]) -> dict[str, Limit]:
        return {name: Limit(**limit) for name, limit in mapping.items()}

    return dict(fields) | {
        "limits": Limit(**fields["limits"]),
        "account_limits": limits(fields["account_limits"]),
        "models": limits(fields["models"]),
    }
