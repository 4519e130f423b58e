"""Where a client may name things as it likes: no key there is taken for steering.

Shapes are paths into a body with `[]` for each list's entries and `*` for any key. They are those of the
fields that vLLM 0.32 declares for a route.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

__all__ = ["Free", "Shape", "free_of", "is_text"]

Shape = tuple[str, ...]

# Fields of whatever text, or tokens, a client sends. JSON in them is text too; elsewhere it counts as JSON.
_TEXTS = {
    "chat_template", "documents", "functions", "generate_chunk", "generate_response",
    "generate_responses", "input", "instructions", "items", "messages", "metadata", "output_config",
    "output_format", "prompt", "queries", "query", "questions", "response_format", "state", "stop",
    "stop_sequences", "structured_outputs", "suffix", "system", "text", "text_1", "text_2", "token_ids",
    "tokens", "tools", "user",
}  # fmt: skip

_OUTPUT = (
    "guided_json",  # of vLLM before 0.12
    "response_format.json_schema.schema",
    "response_format.format",
    "response_format.structures.[].schema",
    "structured_outputs.json",
)
_CHAT = (
    "documents.[]",
    "functions.[].parameters",
    *(
        f"{messages}.{inside}"
        for messages in ("messages.[]", "messages.[].[]")
        for inside in (
            "function_call.arguments",
            "tool_calls.[].function.arguments",
            "tools.[].function.parameters",
        )
    ),
    "tools.[].function.parameters",
    *_OUTPUT,
)
_MESSAGES = (
    "messages.[].content.[].input",
    "messages.[].content.[].tool.definition.input_schema",
    "output_config.format.schema",
    "output_format.schema",
    "tools.[].input_schema",
)
_RESPONSES = (
    "input.[].action",
    "input.[].arguments",
    "input.[].input",
    "input.[].tools.[].input_schema",
    "input.[].tools.[].parameters",
    "prompt.variables",
    "structured_outputs.json",
    "text.format.schema",
    "tools.[].headers",
    "tools.[].parameters",
    "tools.[].tools.[].parameters",
)
_COHERE = (
    "documents.[].data",
    "messages.[].content.[].document.data",
    "messages.[].tool_calls.[].function.arguments",
    "response_format.json_schema",
    "response_format.schema",
    "tools.[].function.parameters",
)
# The answers of another route, with the reports that stood in them.
_REPLIES = ("generate_chunk", "generate_response", "generate_responses")

_BY_ROUTE = {
    "/cohere/v2/chat": _COHERE,
    "/inference/v1/generate": ("sampling_params.structured_outputs.json",),
    "/invocations": (*_CHAT, *_OUTPUT),
    "/tokenize": _CHAT,
    "/v1/chat/completions": _CHAT,
    "/v1/chat/completions/batch": _CHAT,
    "/v1/chat/completions/derender": _REPLIES,
    "/v1/chat/completions/render": _CHAT,
    "/v1/completions": _OUTPUT,
    "/v1/completions/derender": _REPLIES,
    "/v1/completions/render": _OUTPUT,
    "/v1/messages": _MESSAGES,
    "/v1/messages/count_tokens": _MESSAGES,
    "/v1/messages/render": _MESSAGES,
    "/v1/responses": _RESPONSES,
    "/v1/responses/render": _RESPONSES,
    "/v1/systemone": ("state", "questions.*.criteria", "questions.*.instructions"),
}


@dataclass(frozen=True)
class Free:
    """The client's own places in a route's body.

    Args: below: nothing there or below is looked at. keys: objects whose keys are ids of the client's own;
        what they name is looked into.
    """

    below: frozenset[Shape]
    keys: frozenset[Shape]


@cache
def free_of(route: str) -> Free:
    """The client's own places in a body for the route; none where it is not known."""
    below = frozenset(tuple(place.split(".")) for place in _BY_ROUTE.get(route, ()))
    keys = (shape[: shape.index("*")] for shape in below if "*" in shape)
    return Free(below, frozenset(keys))


def is_text(shape: Shape) -> bool:
    """Whether what stands there is the client's text, even if it looks like JSON."""
    return shape[:1] != () and shape[0] in _TEXTS
