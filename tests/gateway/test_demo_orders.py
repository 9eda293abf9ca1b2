"""The demo's own language model: what it says, how sure it is, and how it is served."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import openai
import pytest

from gateway.demo.orders import Model, Order, Written, orders
from tests.processes import Server

SOME = 400

PROMPT = "hey express please well twelve x mug order H H 7 6 4 2 . 0 0 dollars"


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def plain(model: Model) -> list[tuple[Order, list[Written]]]:
    return [(order, list(model.answer(order.prompt, 5))) for order in orders("plain")[:SOME]]


def text_of(written: list[Written]) -> str:
    return "".join(token.text for token in written)


def test_five_of_six_plain_orders_are_written_down_right_and_noisy_ones_are_harder(
    model: Model, plain: list[tuple[Order, list[Written]]]
) -> None:
    right = sum(order.is_right(text_of(written)) for order, written in plain) / SOME
    noisy = orders("noisy")[:SOME]
    harder = sum(o.is_right(text_of(list(model.answer(o.prompt, 0)))) for o in noisy) / SOME
    assert 0.80 < right < 0.88
    assert harder < right - 0.08


def test_it_is_surer_than_it_is_right(plain: list[tuple[Order, list[Written]]]) -> None:
    chances = [math.exp(sum(token.logprob for token in written)) for _, written in plain]
    right = sum(order.is_right(text_of(written)) for order, written in plain) / SOME
    assert sum(chances) / SOME > right + 0.02


def test_alternatives_at_every_place_are_a_distribution_headed_by_what_was_written(
    model: Model,
) -> None:
    for token in model.answer(PROMPT, 154):
        chances = [math.exp(logprob) for _, logprob in token.top]
        assert sum(chances) == pytest.approx(1, abs=1e-5)
        assert chances == sorted(chances, reverse=True)
        assert token.top[0] == (token.text, token.logprob)


@pytest.mark.parametrize("prompt", ["", "words nobody taught it", "mug " * 500])
def test_any_prompt_is_answered_within_its_context(model: Model, prompt: str) -> None:
    assert len(list(model.answer(prompt, 0))) <= 96


def test_the_upstream_serves_it_whole_and_streamed_alike(
    upstream: Server, openai_client: Callable[..., openai.OpenAI]
) -> None:
    client = openai_client(upstream.url)
    asked: dict[str, Any] = {
        "model": "orders",
        "messages": [{"role": "user", "content": PROMPT}],
        "logprobs": True,
        "top_logprobs": 3,
    }
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.message.content is not None
    assert json.loads(whole.message.content).keys() >= {"intent", "qty", "sku", "amount"}
    assert whole.logprobs is not None
    assert whole.logprobs.content is not None
    assert "".join(each.token for each in whole.logprobs.content) == whole.message.content
    assert {len(each.top_logprobs) for each in whole.logprobs.content} == {3}
    chunks = [c.choices[0] for c in client.chat.completions.create(**asked, stream=True)]
    assert "".join(c.delta.content or "" for c in chunks) == whole.message.content
    entries = [e for c in chunks if c.logprobs for e in c.logprobs.content or ()]
    assert entries == whole.logprobs.content
    for chunk in chunks:
        if chunk.logprobs and chunk.logprobs.content:
            assert [e.token for e in chunk.logprobs.content] == [chunk.delta.content]


def test_without_being_asked_it_tells_no_logprobs(
    upstream: Server, openai_client: Callable[..., openai.OpenAI]
) -> None:
    client = openai_client(upstream.url)
    messages: Any = [{"role": "user", "content": PROMPT}]
    answer = client.chat.completions.create(model="orders", messages=messages)
    assert answer.choices[0].logprobs is None


def test_the_other_dialects_serve_it_too(
    upstream: Server, openai_client: Callable[..., openai.OpenAI]
) -> None:
    client = openai_client(upstream.url)
    completion = client.completions.create(model="orders", prompt=PROMPT, logprobs=2).choices[0]
    response = client.responses.create(
        model="orders", input=PROMPT, include=["message.output_text.logprobs"], top_logprobs=2
    )
    assert completion.text == response.output_text
    assert completion.logprobs is not None
    assert "".join(completion.logprobs.tokens or ()) == completion.text
