"""Celery tasks that share a few keys; a task that would wait for one goes back to its queue meanwhile.

    pip install 'stable-openai[celery]'
    export STABLE_OPENAI_KEYS=sk-...,sk-...
    celery -A celery_app worker                 # as many as you like, on any host
    python celery_app.py                        # sends twenty tasks, and prints the answers

All in one Redis, which REDIS names (redis://localhost:6379). To try it without keys:

    python -m stable_openai.testing --keys sk-a,sk-b        # prints a URL, for OPENAI_BASE_URL
"""

from __future__ import annotations

import os

import openai
from celery import Celery, group

from stable_openai import INJECTED, stable
from stable_openai.celery import setup

REDIS = os.environ.get("REDIS", "redis://localhost:6379")

app = Celery("celery_app", broker=f"{REDIS}/1", backend=f"{REDIS}/2")
app.conf.stable_openai_keys = os.environ["STABLE_OPENAI_KEYS"]
app.conf.stable_openai_redis = f"{REDIS}/0"
app.conf.stable_openai_limits = {"rpm": 500, "concurrency": 4}  # of each key
setup(app)


@app.task(acks_late=True, reject_on_worker_lost=True)  # so that a worker that is killed loses none
@stable(model="gpt-4o-mini")
def ask(prompt: str, client: openai.OpenAI = INJECTED) -> str | None:
    response = client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": prompt}])
    return response.choices[0].message.content


if __name__ == "__main__":
    prompts = [f"What is {number} times {number}?" for number in range(20)]
    answers = group(ask.s(prompt) for prompt in prompts).apply_async().get()
    for prompt, answer in zip(prompts, answers):
        print(f"{prompt} {answer}")
