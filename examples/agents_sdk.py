"""The openai Agents SDK on a drop-in client: every turn of every agent leases a key.

    pip install stable-openai openai-agents
    STABLE_OPENAI_KEYS=sk-...,sk-... python examples/agents_sdk.py

Only what the client sends is leased. Traces need OPENAI_API_KEY, or are disabled as here; the SDK's transport
"websocket" goes past the client, without a key. See threads.py for how to try it without keys.
"""

from __future__ import annotations

import asyncio

import agents
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner
from pydantic import BaseModel, Field

from stable_openai import AsyncOpenAI, KeyManager, Limits

manager = KeyManager(limits=Limits(rpm=500, concurrency=2))
client = AsyncOpenAI()
agents.set_default_openai_client(client, use_for_tracing=False)
agents.set_tracing_disabled(True)


class Forecast(BaseModel):
    celsius: int = Field(ge=-50, le=50)


@agents.function_tool
def temperature(city: str) -> int:
    """The temperature of a city now."""
    return len(city)


agent = Agent("Weather", model="gpt-4o-mini", tools=[temperature], model_settings=ModelSettings(tool_choice="required"))
chat_agent = agent.clone(model=OpenAIChatCompletionsModel("gpt-4o-mini", openai_client=client))
forecaster = Agent("Forecast", model="gpt-4o-mini", output_type=Forecast)


async def main(questions: list[str]) -> None:
    for kind in (agent, chat_agent):
        for result in await asyncio.gather(*(Runner.run(kind, question) for question in questions)):
            print(result.final_output)
        async for event in Runner.run_streamed(kind, "And in Paris?").stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                print(event.data.delta, end="")
        print()
    print((await Runner.run(forecaster, "And tomorrow?")).final_output)
    await manager.aclose()


if __name__ == "__main__":
    cities = [f"How warm is it in {city}?" for city in ("Rome", "Oslo", "Lima", "Cairo", "Quito")]
    print(Runner.run_sync(agent, cities[0]).final_output)
    asyncio.run(main(cities))
