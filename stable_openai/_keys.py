"""Keys, their secrets, and the fingerprint by which everybody else knows them.

A secret leaves this module only through `Secret.reveal()`, which is called where a request is made and nowhere
else. Redis, logs and messages know a key by its fingerprint and its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NoReturn

from stable_openai._limits import Limits, matches
from stable_openai.errors import ConfigurationError

__all__ = ["Key", "Secret", "as_keys", "normalise_url"]


class Secret:
    """A string that does not show itself: not in a repr, a message or a pickle."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret('***')"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a secret is not pickled: pass the keys to the other process by its own configuration")


class Key:
    """An API secret with its settings.

    Args:
        secret: the API key, such as "sk-...".
        name: a label for logs and tables; the fingerprint where none is given.
        account: who owns the quotas. Keys of one OpenAI organisation or project share one account; by default
            a key is its own.
        limits: what is known of this account's limits; it goes field by field over the manager's.
        models: the models (exact names or patterns such as "gpt-4o*") that this key serves; None: all. A mapping also
            says under which name this key's endpoint knows each: `{"gpt-4o": "my-deployment"}`.
        base_url: the endpoint that this key belongs to, such as "https://host/v1"; None: the client's own default.
        api_version: of an Azure resource whose deployments are addressed by their names ("2024-10-21"; base_url is
            then "https://my-resource.openai.azure.com"). Azure's newer "/openai/v1" needs none.
        weight: a whole number; a key of weight 2 is chosen twice as often among those that are ready.

    >>> Key("sk-a", name="team-a", account="org-1").name
    'team-a'
    """

    __slots__ = (
        "account", "api_version", "base_url", "fingerprint", "limits", "models", "name", "names", "secret", "weight",
    )  # fmt: skip

    def __init__(
        self,
        secret: str,
        *,
        name: str | None = None,
        account: str | None = None,
        limits: Limits | None = None,
        models: Iterable[str] | Mapping[str, str] | None = None,
        base_url: str | None = None,
        api_version: str | None = None,
        weight: int = 1,
    ) -> None:
        if not isinstance(secret, str) or not secret.strip():
            raise ConfigurationError("key", "is empty; give the API key as a string such as 'sk-...'")
        if " " in secret or not secret.isprintable():
            raise ConfigurationError("key", "has white space or control characters around or inside it; strip them")
        if not secret.isascii():  # no HTTP header can carry it
            raise ConfigurationError("key", "has characters that are not ASCII; copy it again")
        if not isinstance(weight, int) or isinstance(weight, bool) or not 1 <= weight <= 1000:
            raise ConfigurationError("weight", "must be a whole number from 1 to 1000")
        for field, label in (("name", name), ("account", account)):
            if label is not None and (not isinstance(label, str) or not label or not label.isprintable()):
                raise ConfigurationError(field, "must be a name of one line, or left out")
            if label is not None and secret in label:  # it is shown, and known to Redis
                raise ConfigurationError(field, "holds the key itself; use a name that may be shown")
        if isinstance(models, str):
            raise ConfigurationError("models", f"must be a list of names; write [{models!r}]")
        self.names = dict(models) if isinstance(models, Mapping) else {}
        if not all(isinstance(name, str) and name and name.isprintable() for name in self.names.values()):
            raise ConfigurationError("models", "must map the names of models to those that the endpoint knows")
        if api_version is not None and (not isinstance(api_version, str) or not api_version or not base_url):
            raise ConfigurationError("api_version", "is a date such as '2024-10-21', beside the base_url of a resource")
        if api_version is not None and str(base_url).rstrip("/").endswith("/openai/v1"):
            raise ConfigurationError("api_version", "is not for /openai/v1; leave it out, or that path")
        models = None if models is None else tuple(models)
        if models is not None and not all(isinstance(model, str) and model for model in models):
            raise ConfigurationError("models", "must be a list of names or patterns such as 'gpt-4o*'")
        if limits is not None and not isinstance(limits, Limits):
            raise ConfigurationError("limits", "must be a Limits(...)")
        import hashlib  # here, so that importing the package stays quick

        self.secret = Secret(secret)
        self.base_url = normalise_url(base_url)
        self.api_version = api_version
        identity = f"{self.base_url or ''}\0{secret}".encode()
        self.fingerprint = hashlib.blake2b(identity, digest_size=8).hexdigest()
        self.name = name or self.fingerprint
        self.account = account or self.fingerprint
        self.limits = limits
        self.models = models
        self.weight = weight

    def called(self, model: str) -> str:
        """The name under which the key's endpoint knows a model."""
        if not self.names or not model:
            return model
        return self.names.get(model) or next((to for of, to in self.names.items() if matches(model, of)), model)

    def __repr__(self) -> str:
        return f"Key('***', name={self.name!r}, account={self.account!r}, fingerprint={self.fingerprint!r})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Key is not pickled: it holds a secret")


def normalise_url(url: str | None) -> str | None:
    """The URL with its scheme and host in lower case, without a default port or a slash at the end."""
    if url is None:
        return None
    from urllib.parse import urlsplit  # here, so that importing the package stays quick

    host = None
    if isinstance(url, str) and url.isprintable() and " " not in url:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            pass
    if not host or parts.scheme.lower() not in ("http", "https"):
        raise ConfigurationError("base_url", "cannot be parsed; write it as 'https://host/v1'")
    if "@" in parts.netloc:
        raise ConfigurationError("base_url", "holds a user name or password, which the API key takes the place of")
    scheme = parts.scheme.lower()
    if ":" in host:
        host = f"[{host}]"
    if port is not None and port != {"http": 80, "https": 443}[scheme]:
        host = f"{host}:{port}"
    query = f"?{parts.query}" if parts.query else ""
    return f"{scheme}://{host}{parts.path.rstrip('/')}{query}"


def as_keys(keys: Iterable[str | Key] | Mapping[str, str]) -> tuple[Key, ...]:
    """The keys of a pool: strings become keys; an empty list and duplicates are refused."""
    if isinstance(keys, (str, bytes)):
        raise ConfigurationError("keys", "must be a list of keys; put the one key into a list")
    made = tuple(key if isinstance(key, Key) else Key(key) for key in keys)
    if not made:
        raise ConfigurationError(
            "keys", "there are none; give at least one, or set STABLE_OPENAI_KEYS or OPENAI_API_KEY"
        )
    seen: dict[str, int] = {}
    for position, key in enumerate(made):
        if key.fingerprint in seen:
            first = seen[key.fingerprint]
            raise ConfigurationError("keys", f"number {position + 1} repeats number {first + 1}; list each key once")
        seen[key.fingerprint] = position
    return made
