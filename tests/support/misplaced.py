"""Ways to ask for steering in the wrong place, by the wrong name, or twice: honoured or refused, each."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["BODIES", "PLACES", "SPELLINGS", "Form", "forms", "lines"]

Body = dict[str, Any]
MESSAGES = [{"role": "user", "content": "w5 w6 w7"}]
PROMPT = [5, 6, 7]
GREEDY = {"max_tokens": 2, "temperature": 0}

# A sound body for every route that generates.
BODIES: dict[str, Body] = {
    "/generative_scoring": {"query": [5, 6], "items": [[7], [8]], "label_token_ids": [9, 10]},
    "/inference/v1/generate": {"token_ids": PROMPT, "sampling_params": GREEDY},
    "/invocations": {"prompt": PROMPT, **GREEDY},
    "/v1/chat/completions": {"messages": MESSAGES, **GREEDY},
    "/v1/chat/completions/batch": {"messages": [MESSAGES, MESSAGES], **GREEDY},
    "/v1/completions": {"prompt": PROMPT, **GREEDY},
    "/v1/messages": {"messages": MESSAGES, **GREEDY},
    "/v1/responses": {"input": "w5 w6 w7", "max_output_tokens": 2, "temperature": 0},
}
SPELLINGS = (
    "steering", "Steering", "STEERING", "steer", "steerings", "steered", "Steer", "interventions",
    "intervention", "Interventions", "stering", "steerring", "sterring", "streering", "stearing", "steeering",
    "steerign", "streeing", "steerng", "teering", "steering ", "_steering", "x-steering", "steering_vector",
    "steering-config", "saeSteering", "steerserve", "interventons", "interventoins", "steering_ticket",
    "st\u00e9ering", "\uff53teering",
)  # fmt: skip


def _at(*keys: str) -> Callable[[Body, str, Any], Body]:
    """Puts a key into what stands at a path of the body, which is made where it is not there."""

    def put(body: Body, name: str, value: Any) -> Body:
        changed: Body = copy.deepcopy(body)
        holder = changed
        for key in keys:
            if not isinstance(holder.get(key), dict):
                holder[key] = {}
            holder = holder[key]
        holder[name] = value
        return changed

    return put


def _in_message(body: Body, name: str, value: Any) -> Body:
    return {**body, "messages": [{**MESSAGES[0], name: value}]}


def _in_content(body: Body, name: str, value: Any) -> Body:
    return {**body, "messages": [{"role": "user", "content": [{"type": "text", "text": "w5", name: value}]}]}


def _in_tool(body: Body, name: str, value: Any) -> Body:
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    return {**body, "tools": [{"type": "function", "function": function, name: value}]}


def _in_text_of(key: str) -> Callable[[Body, str, Any], Body]:
    return lambda body, name, value: {**body, key: json.dumps({name: value})}


PLACES: dict[str, Callable[[Body, str, Any], Body]] = {
    "the body": _at(),
    "extra_body": _at("extra_body"),
    "extra_body twice": _at("extra_body", "extra_body"),
    "extra_args": _at("extra_args"),
    "vllm_xargs": _at("vllm_xargs"),
    "xargs of extra_body": _at("extra_body", "vllm_xargs"),
    "sampling_params": _at("sampling_params"),
    "extra_args of sampling_params": _at("sampling_params", "extra_args"),
    "xargs of sampling_params": _at("sampling_params", "vllm_xargs"),
    "chat_template_kwargs": _at("chat_template_kwargs"),
    "metadata": _at("metadata"),
    "nvext": _at("nvext"),
    "options": _at("options", "model"),
    "kv_transfer_params": _at("kv_transfer_params"),
    "mm_processor_kwargs": _at("mm_processor_kwargs"),
    "a message": _in_message,
    "a part of a message": _in_content,
    "a tool": _in_tool,
    "text in extra_body": _in_text_of("extra_body"),
    "text in vllm_xargs": _in_text_of("vllm_xargs"),
    "text in extra_args": _in_text_of("extra_args"),
}


@dataclass(frozen=True)
class Form:
    """A request. Args: asked: how it asks, in words; content: its body; head: headers; query: as written."""

    asked: str
    content: bytes
    head: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)
    query: str = ""


def forms(route: str, steering: Body, *, whole: bool = True) -> Iterator[Form]:
    """Forms for a route: misplaced, misspelt, doubled, unwrapped, and in the head or a form.

    Args:
        steering: a sound `steering` object.
        whole: every spelling in every place; else each spelling in the body, and three in each place.
    """
    body = {"model": "tiny", **BODIES.get(route, {})}
    for (where, put), name in itertools.product(PLACES.items(), SPELLINGS):
        if not (whole or where == "the body" or name in ("steering", "Steering", "interventions")):
            continue
        inner = steering["interventions"] if "nterv" in name else steering
        for said in (inner, json.dumps(inner)):
            kind = "text" if isinstance(said, str) else "an object"
            yield Form(f"`{name}` as {kind} in {where}", json.dumps(put(body, name, said)).encode())
    yield from _unwrapped(body, steering)
    yield from _doubled(body, steering)
    yield from _elsewhere(body, steering)


def _unwrapped(body: Body, steering: Body) -> Iterator[Form]:
    """An intervention without what holds it."""
    change = steering["interventions"][0]
    for said, more in {
        "the keys of an intervention in the body": change,
        "an intervention by another name": {"sae": change},
        "a list of interventions by another name": {"edits": [change]},
        "interventions in text": {"edits": json.dumps([change])},
        "interventions in metadata": {"metadata": {"edit": change}},
    }.items():
        yield Form(said, json.dumps({**body, **more}).encode())


def _doubled(body: Body, steering: Body) -> Iterator[Form]:
    """Keys of one object twice, of which a parser keeps the last; and steering in two places."""
    start, asked = json.dumps(body)[:-1], json.dumps(steering)
    text = json.dumps(asked)
    for said, more in {
        "steering twice": f'"steering": {asked}, "steering": {asked}',
        "steering, then null": f'"steering": {asked}, "steering": null',
        "steering twice, once escaped": f'"\\u0073teering": {asked}, "steering": {asked}',
        "vllm_xargs, then an empty one": f'"vllm_xargs": {{"steering": {text}}}, "vllm_xargs": {{}}',
        "vllm_xargs with two": f'"vllm_xargs": {{"steering": {text}, "steering": {text}}}',
        "vllm_xargs, then null": f'"vllm_xargs": {{"steering": {text}}}, "vllm_xargs": null',
        "a dropped extra_body": f'"extra_body": {{"steering": {asked}}}, "extra_body": 1',
        "a key twice inside": f'"steering": {{"interventions": [], {asked[1:]}',
        "the body and vllm_xargs": f'"steering": {asked}, "vllm_xargs": {{"steering": {text}}}',
        "the body and extra_body": f'"steering": {asked}, "extra_body": {{"steering": {asked}}}',
        "the body and a misspelling": f'"steering": {asked}, "Steering": {asked}',
        "the body and a bare list": f'"steering": {asked}, "interventions": []',
    }.items():
        yield Form(said, f"{start}, {more}}}".encode())


def _elsewhere(body: Body, steering: Body) -> Iterator[Form]:
    """In another encoding, in the head, in a form."""
    plain, asked = json.dumps(body).encode(), json.dumps(steering)
    wrong = json.dumps({**body, "extra_body": {"steering": steering}})
    head = (("content-type", "application/json"),)
    for encoding in ("utf-16", "utf-16-be", "utf-32", "utf-8-sig"):
        yield Form(f"extra_body in {encoding}", wrong.encode(encoding))
    yield Form("extra_body escaped", wrong.replace("steer", "\\u0073teer").encode())
    for name in ("steering", "Steering", "x-steering", "interventions", "stering"):
        yield Form(f"header {name}", plain, (*head, (name, asked)))
    for query in ("steering={}", "Steering=1", "interventions=[]", "extra_body[steering]=1", "a.steering=1"):
        yield Form(f"query {query}", plain, query=query)
    yield Form("query of text", plain, query=f"extra_body={json.dumps({'steering': 1})}")
    fields = {
        "steering": asked,
        "Stering": asked,
        "steering[interventions][0][feature]": "5",
        "extra_body[steering]": asked,
        "extra_body": json.dumps({"steering": steering}),
        "vllm_xargs": json.dumps({"steering": asked}),
        "metadata.steering": asked,
    }
    for name, value in fields.items():
        part = f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n--b--\r\n'
        yield Form(
            f"form field {name}", part.encode(), (("content-type", "multipart/form-data; boundary=b"),)
        )
    file = '--b\r\nContent-Disposition: form-data; name="steering"; filename="s.json"\r\n\r\n{}\r\n--b--\r\n'
    yield Form("form file", file.encode(), (("content-type", "multipart/form-data; boundary=b"),))


def lines(steering: Body) -> Iterator[tuple[str, str]]:
    """Lines of a batch file, each with how it asks, in words, which its `custom_id` is too."""
    body = {"model": "tiny", **BODIES["/v1/chat/completions"]}

    def line(said: str, text: str, **more: Any) -> tuple[str, str]:
        start = {"custom_id": said, "method": "POST", "url": "/v1/chat/completions", **more}
        return said, f'{json.dumps(start)[:-1]}, "body": {text}}}'

    for name in SPELLINGS:
        yield line(f"`{name}` beside the body", json.dumps(body), **{name: steering})
    for form in forms("/v1/chat/completions", steering):
        if form.head == Form("", b"").head and not form.query and form.content.startswith(b"{"):
            yield line(form.asked, form.content.decode())
