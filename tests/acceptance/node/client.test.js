// The official Node client against a gateway: `node client.test.js <gateway URL> <upstream URL>`.

import assert from "node:assert/strict";
import { File as NodeFile } from "node:buffer";
import { createHash } from "node:crypto";
import test from "node:test";

import OpenAI from "openai";

globalThis.File ??= NodeFile; // Node 18 has it, but not as a global
const [gateway, upstream] = process.argv.slice(2);
const model = "demo-large";

// As an application makes it, retries and all. Every request carries its task, and a mark that tells its upstream calls apart.
function clientFor(task, mark) {
  return new OpenAI({
    baseURL: `${gateway}/v1`,
    apiKey: "sk-test-client",
    defaultHeaders: { "x-holdgate-task": task, "x-mark": mark },
  });
}

const say = (script) => [{ role: "user", content: JSON.stringify({ demo: script }) }];

async function timesAsked(mark) {
  const { calls } = await (await fetch(`${upstream}/calls`)).json();
  return calls.filter((call) => call.headers["x-mark"] === mark).length;
}

async function review(path, body) {
  const response = await fetch(`${gateway}/review/${path}`, body && {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  });
  assert.equal(response.status, 200, await response.clone().text());
  return response.json();
}

async function taskOf(text) {
  const until = Date.now() + 15_000;
  while (Date.now() < until) {
    for (const { id } of (await review("queue?limit=200")).data) {
      if (JSON.stringify((await review(id)).request).includes(text)) return id;
    }
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  throw new Error(`no task for ${text}`);
}

const failure = (promise) => promise.then(() => assert.fail("it did not fail"), (error) => error);

test("a response comes back with the decision in its headers", async () => {
  const { data, response } = await clientFor("plain", "plain")
    .chat.completions.create({ model, messages: say({ text: "Hello, Grüße, 你好." }) })
    .withResponse();
  assert.equal(data.choices[0].message.content, "Hello, Grüße, 你好.");
  assert.equal(response.headers.get("x-holdgate-action"), "return");
  assert.match(response.headers.get("x-holdgate-decision"), /^hgd_/);
  assert.equal(data._request_id, response.headers.get("x-request-id"));
});

test("a stream arrives whole, usage included", async () => {
  for (const task of ["plain", "whole"]) {
    const stream = await clientFor(task, "stream").chat.completions.create({
      model,
      messages: say({ text: "One two three four five." }),
      stream: true,
      stream_options: { include_usage: true },
    });
    const chunks = [];
    for await (const chunk of stream) chunks.push(chunk);
    const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
    assert.equal(text, "One two three four five.");
    assert.ok(chunks.at(-1).usage.total_tokens > 0);
  }
});

test("tool calls arrive whole, streamed or not", async () => {
  const client = clientFor("plain", "tools");
  const called = { name: "issue_refund", arguments: { order_id: "A-1", amount: 40.5 } };
  const request = {
    model,
    messages: say({ tool_calls: [called] }),
    tools: [{ type: "function", function: { name: "issue_refund", parameters: { type: "object" } } }],
  };
  const whole = await client.chat.completions.create(request);
  const streamed = await client.chat.completions.stream(request).finalChatCompletion();
  for (const { choices: [choice] } of [whole, streamed]) {
    assert.equal(choice.finish_reason, "tool_calls");
    const [call] = choice.message.tool_calls;
    assert.equal(call.function.name, called.name);
    assert.deepEqual(JSON.parse(call.function.arguments), called.arguments);
  }
});

test("logprobs that only the policy wanted are not shown", async () => {
  const client = clientFor("scored", "logprobs");
  const request = { model, messages: say({ echo: true }) };
  const [choice] = (await client.chat.completions.create(request)).choices;
  assert.equal(JSON.parse(choice.message.content).body.logprobs, true);
  assert.ok(!choice.logprobs);
  for await (const chunk of await client.chat.completions.create({ ...request, stream: true })) {
    assert.ok(!chunk.choices[0]?.logprobs);
  }
  const asked = await client.chat.completions.create({ ...request, logprobs: true });
  assert.ok(asked.choices[0].logprobs.content.length > 0);
});

test("a held response is one 423 and not three, and can be fetched once approved", async () => {
  const client = clientFor("hold", "held");
  const messages = say({ text: "Held in Node." });
  const error = await failure(client.chat.completions.create({ model, messages }));
  assert.ok(error instanceof OpenAI.APIError);
  assert.equal(error.status, 423);
  assert.equal(error.code, "response_held");
  assert.equal(error.type, "policy_hold");
  const { id, url, status } = error.error.hold;
  assert.equal(status, "held");
  assert.equal(error.headers.get("location"), url);
  assert.equal(await timesAsked("held"), 1);

  const early = await failure(client.chat.completions.retrieve(id));
  assert.equal(early.status, 423);
  await review(`${await taskOf("Held in Node.")}/submit`, { verdict: "approve" });
  const completion = await client.chat.completions.retrieve(id);
  assert.equal(completion.choices[0].message.content, "Held in Node.");
  assert.equal(await timesAsked("held"), 1);
});

test("a waiting client gets the response as soon as somebody approves, streamed or not", async () => {
  const client = clientFor("wait", "waiting");
  for (const stream of [false, true]) {
    const text = `Waiting in Node, stream ${stream}.`;
    const answer = client.chat.completions.create({ model, messages: say({ text }), stream });
    await review(`${await taskOf(text)}/submit`, { verdict: "approve" });
    let said = "";
    if (stream) for await (const chunk of await answer) said += chunk.choices[0]?.delta.content ?? "";
    else said = (await answer).choices[0].message.content;
    assert.equal(said, text);
  }
  assert.equal(await timesAsked("waiting"), 2);
});

test("a rejected response is a PermissionDeniedError with the reason", async () => {
  const text = "Rejected in Node.";
  const answer = failure(clientFor("wait", "rejected").chat.completions.create({ model, messages: say({ text }) }));
  await review(`${await taskOf(text)}/submit`, { verdict: "reject", reason: "off topic" });
  const error = await answer;
  assert.ok(error instanceof OpenAI.PermissionDeniedError);
  assert.equal(error.code, "response_rejected");
  assert.match(error.message, /off topic/);
  assert.equal(await timesAsked("rejected"), 1);
});

test("a blocked response is a PermissionDeniedError, streamed or not, and none of it is told", async () => {
  for (const stream of [false, true]) {
    const messages = say({ text: "The door opens with CODE-1234." });
    const error = await failure(
      clientFor("guard", `blocked-${stream}`).chat.completions.create({ model, messages, stream }),
    );
    assert.ok(error instanceof OpenAI.PermissionDeniedError);
    assert.equal(error.code, "response_blocked");
    assert.doesNotMatch(JSON.stringify(error.error), /CODE-1234/);
    assert.equal(await timesAsked(`blocked-${stream}`), 1);
  }
});

test("the Responses API: plain, streamed, held and retrieved", async () => {
  const [{ content: input }] = say({ text: "From the Responses API." });
  const plain = clientFor("plain", "responses");
  assert.equal((await plain.responses.create({ model, input })).output_text, "From the Responses API.");
  let text = "";
  for await (const event of await plain.responses.create({ model, input, stream: true })) {
    if (event.type === "response.output_text.delta") text += event.delta;
    if (event.type === "response.completed") assert.equal(event.response.status, "completed");
  }
  assert.equal(text, "From the Responses API.");

  const held = clientFor("hold", "responses-held");
  const [{ content: kept }] = say({ text: "A held Response." });
  const error = await failure(held.responses.create({ model, input: kept }));
  assert.equal(error.status, 423);
  await review(`${await taskOf("A held Response.")}/submit`, { verdict: "approve" });
  assert.equal((await held.responses.retrieve(error.error.hold.id)).output_text, "A held Response.");
  assert.equal(await timesAsked("responses-held"), 1);
});

test("a file is uploaded as multipart, byte for byte", async () => {
  const bytes = Buffer.from(Array.from({ length: 300_000 }, (_, place) => (place * 7) % 256));
  const file = await clientFor("plain", "upload").files.create({
    file: await OpenAI.toFile(bytes, "Übersicht.bin"),
    purpose: "user_data",
  });
  assert.equal(file.bytes, bytes.length);
  assert.equal(file.filename, "Übersicht.bin");
  assert.equal(file.sha256, createHash("sha256").update(bytes).digest("hex"));
});

test("binary answers are downloaded byte for byte", async () => {
  const client = clientFor("plain", "download");
  const file = await client.files.content("file-300000");
  const expected = Buffer.from(Array.from({ length: 300_000 }, (_, place) => place % 256));
  assert.ok(expected.equals(Buffer.from(await file.arrayBuffer())));
  const speech = await client.audio.speech.create({ model: "tts", voice: "alloy", input: "Hello" });
  assert.equal(speech.headers.get("content-type"), "audio/mpeg");
  assert.equal((await speech.arrayBuffer()).byteLength, 4101);
});
