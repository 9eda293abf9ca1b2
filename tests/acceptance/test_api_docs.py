"""The examples of docs/api.md, run as they are printed."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

from tests.acceptance.acting import Reviewer, caller, scripted
from tests.acceptance.conftest import POLICIES, ClientFor
from tests.conftest import GatewayFactory

API = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
NODE = Path(__file__).parent / "node"
USE_IN_NODE = """
import OpenAI from "openai";
const [baseURL, content] = process.argv.slice(1);
const client = new OpenAI({ baseURL, apiKey: "sk-test", defaultHeaders: { "x-holdgate-task": "hold" } });
const completion = await answered(client, { model: "demo-large", messages: [{ role: "user", content }] });
console.log(completion.choices[0].message.content);
"""


def _example(language: str) -> str:
    (example,) = re.findall(rf"^```{language}\n(.*?)^```", API, re.MULTILINE | re.DOTALL)
    return str(example)


async def test_the_python_example_waits_for_the_review(
    gateway: GatewayFactory, client_for: ClientFor
) -> None:
    server = gateway({"hold": POLICIES["hold"]})
    names: dict[str, Any] = {}
    exec(compile(_example("python"), "docs/api.md", "exec"), names)
    messages = [{"role": "user", "content": scripted(text="An example in Python.")}]
    asking = asyncio.to_thread(
        names["answered"], client_for("hold", server), model="demo-large", messages=messages
    )
    answer = asyncio.create_task(asking)
    async with caller(server.url) as http:
        await Reviewer(http).approve("An example in Python.")
    assert (await answer).choices[0].message.content == "An example in Python."


async def test_the_node_example_waits_for_the_review(gateway: GatewayFactory) -> None:
    server = gateway({"hold": POLICIES["hold"]})
    node = await asyncio.create_subprocess_exec(
        *("node", "--input-type=module", "--eval", _example("js") + USE_IN_NODE),
        *(f"{server.url}/v1", scripted(text="An example in Node.")),
        cwd=NODE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with caller(server.url) as http:
        await Reviewer(http).approve("An example in Node.")
    said, errors = await node.communicate()
    assert (node.returncode, said) == (0, b"An example in Node.\n"), errors.decode()
