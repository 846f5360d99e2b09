"""A fake OpenAI upstream for tests: it keeps limits exactly, fails on demand, and remembers every request.

    from stable_openai.testing import Failure, FakeOpenAI, Limit

    with FakeOpenAI(keys={"sk-a": "org-1", "sk-b": "org-2"}, limits=Limit(rpm=60)) as fake:
        fake.fail(Failure.rate_limit(retry_after_ms=20), key="sk-a")
        run_my_code(base_url=fake.url)
        assert not fake.over                     # nothing ever exceeded a limit
        print([entry.account for entry in fake.log])

It imports nothing else of stable_openai: it is the judge of whether the broker ever exceeded a limit. It
needs h11, which comes with openai. For pytest there are fixtures, of a fake and of a manager on it, to be imported in
a conftest.py: see fixtures.py. Where to change what:

    settings.py  the arguments                        upstream.py  the judgement of a request, and the log
    visits.py    a request, its entry in the log      admin.py     the endpoints to look at it from outside
    limits.py    what an account may do               meters.py    the window rules, exactly
    routes.py    which endpoint a path means          multipart.py forms with files
    answers.py   what answers are made of, tokens     refusals.py  401, 404, 429 and their headers
    chat.py      chat, and the old completions        responses.py responses
    endpoints.py the other endpoints of models        stored.py    files, kept responses, the list of models
    schemas.py   calls of functions, JSON by schema   packing.py   gzip
    failures.py  what can be injected                 service.py   pauses, answers that break off
    wire.py      HTTP on a connection                 server.py    `FakeOpenAI`, its thread
    process.py   `FakeProcess`                        __main__.py  the command line
    fixtures.py  pytest's, the one file here that imports the broker
"""

from __future__ import annotations

from .failures import Failure, closed_port
from .limits import Limit
from .process import FakeProcess
from .server import Connections, FakeOpenAI
from .visits import Entry

__all__ = ["Connections", "Entry", "Failure", "FakeOpenAI", "FakeProcess", "Limit", "closed_port"]
