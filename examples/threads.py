"""Ten threads share a few keys, each prompt waiting for the key that may be used then.

    STABLE_OPENAI_KEYS=sk-...,sk-... python examples/threads.py

Processes on other hosts share the limits too where STABLE_OPENAI_REDIS names a Redis. To try it without keys:

    python -m stable_openai.testing --keys sk-a,sk-b        # prints a URL, for OPENAI_BASE_URL
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai

from stable_openai import INJECTED, KeyManager, Limits, stable

manager = KeyManager(limits=Limits(rpm=500, concurrency=4))  # the keys are those of the environment


@stable(manager=manager)
def ask(prompt: str, model: str = "gpt-4o-mini", client: openai.OpenAI = INJECTED) -> str | None:
    response = client.chat.completions.create(model=model, messages=[{"role": "user", "content": prompt}])
    return response.choices[0].message.content


if __name__ == "__main__":
    prompts = [f"What is {number} times {number}?" for number in range(20)]
    with ThreadPoolExecutor(10) as threads:
        for prompt, answer in zip(prompts, threads.map(ask, prompts)):
            print(f"{prompt} {answer}")
    manager.close()
