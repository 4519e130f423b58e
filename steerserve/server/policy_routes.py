"""The routes that show the policies in force, and change them one document at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, Header, Request
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from steerserve.access.principal import Principal
from steerserve.errors import MissingError, ReadOnlyError, RequestError
from steerserve.policy import Applies, KnownNames, Policy, PolicyChange, PolicyFolder
from steerserve.policy.document import MAX_BYTES, Mode

from .guard import principal_of
from .refusal import refusal
from .routing import path_of

__all__ = ["PolicyDocument", "PolicyList", "PolicyState", "add_policy_routes"]

_YAML_TYPES = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml", "text/plain")

IfMatch = Annotated[str | None, Header(description="the ETag of the policy that is changed, or `*`")]
IfNoneMatch = Annotated[str | None, Header(description="`*` to create a policy and never replace one")]

Missing = Annotated[
    list[str],
    Field(
        description="names in `applies` that no request can have now: misspelt, or of a LoRA or key to come"
    ),
]


class PolicyState(Protocol):
    """What these routes need to know."""

    @property
    def policies(self) -> PolicyFolder[Any] | None:
        """The folder; None where none is configured."""

    @property
    def names(self) -> KnownNames:
        """The names that requests can have now."""

    def record_change(self, change: PolicyChange, principal: Principal | None) -> None:
        """Put a change that is about to be made, and who makes it, on the audit log; waits for the disk.

        Raises: UnavailableError if that cannot be done: the change is then not made.
        """

    def record_failure(self, change: PolicyChange, principal: Principal | None, error: Exception) -> None:
        """Put on the audit log that a change was not made after all; waits for nothing."""


class PolicyDocument(BaseModel):
    """One policy that is in force, and its document."""

    name: str
    version: int
    mode: Mode
    owner: str
    reason: str
    applies: Applies
    missing: Missing
    etag: str = Field(description="what `If-Match` wants when the policy is changed")
    text: str = Field(description="the document, YAML")


class PolicyList(BaseModel):
    """Every policy that is in force."""

    object: Literal["list"] = "list"
    version: str = Field(description="identifies every byte of all the documents")
    problem: str | None = Field(description="why what the folder holds now is not in force; null where it is")
    data: list[PolicyDocument]


class PolicyChanged(BaseModel):
    """A change that is in force, and on the audit log."""

    object: Literal["policy.change"] = "policy.change"
    name: str
    action: Literal["created", "replaced", "deleted"]
    old_version: int | None = Field(description="null where there was none, or its document was damaged")
    new_version: int | None = Field(description="null where the policy was deleted")
    mode: Mode | None = Field(description="of the policy now in place; null where it was deleted")
    missing: Missing
    etag: str | None = Field(description="of the policy now in place; null where it was deleted")


class ErrorDetails(BaseModel):
    """What was expected, what came, and where."""

    message: str
    type: str
    param: str
    code: int


class ErrorReply(BaseModel):
    """An error in OpenAI's shape."""

    error: ErrorDetails


_Responses = dict[int | str, dict[str, Any]]
_ERRORS: _Responses = {
    400: {"model": ErrorReply, "description": "The document, or the set with it, cannot be enforced"},
    401: {"model": ErrorReply, "description": "No key, or none that is known"},
    403: {"model": ErrorReply, "description": "The key may not do this"},
    404: {"model": ErrorReply, "description": "No such policy, or no folder of policies is configured"},
    405: {"model": ErrorReply, "description": "The folder cannot be written: change it where it comes from"},
    412: {"model": ErrorReply, "description": "The policy in place is not the one that was read"},
    503: {"model": ErrorReply, "description": "The change cannot be made, or not be audited, now"},
}
_READ_ERRORS: _Responses = {code: _ERRORS[code] for code in (401, 403, 404)}
_ETAG: dict[str, Any] = {"headers": {"ETag": {"schema": {"type": "string"}}}}
_YAML_BODY = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": {"type": "string"}} for kind in ("application/yaml", "text/plain")},
    }
}


def add_policy_routes(router: APIRouter, state: PolicyState) -> None:
    """Add the routes under `/policies`."""

    @router.get("/policies", response_model=PolicyList, responses=_READ_ERRORS)
    def policies(request: Request) -> Response:
        """The policies in force, and whether the folder holds others that are refused."""
        return _answer(request, lambda: _list(state))

    @router.get("/policies/{name}", response_model=PolicyDocument, responses={200: _ETAG, **_READ_ERRORS})
    def policy(request: Request, name: str) -> Response:
        """One policy in force, with its document and ETag."""
        return _answer(request, lambda: _show(state, name))

    @router.put(
        "/policies/{name}",
        response_model=PolicyChanged,
        responses={200: _ETAG, 201: {"model": PolicyChanged, "description": "Created", **_ETAG}, **_ERRORS},
        openapi_extra=_YAML_BODY,
    )
    async def put_policy(
        request: Request, name: str, if_match: IfMatch = None, if_none_match: IfNoneMatch = None
    ) -> Response:
        """Create or replace a policy by its YAML document; in force when this answers."""

        try:
            folder, content = _folder(state), await _document(request)
        except RequestError as error:
            return _refused(error, request)
        put = partial(folder.put, name, content, if_match=if_match, if_none_match=if_none_match)
        return await run_in_threadpool(_answer, request, partial(_change, request, state, put))

    @router.delete("/policies/{name}", response_model=PolicyChanged, responses=_ERRORS)
    def delete_policy(request: Request, name: str, if_match: IfMatch = None) -> Response:
        """Take a policy out of force."""

        def delete(record: Callable[[PolicyChange], None]) -> PolicyChange:
            return _folder(state).delete(name, if_match=if_match, record=record)

        return _answer(request, lambda: _change(request, state, delete))


def _answer(request: Request, work: Callable[[], Response]) -> Response:
    try:
        return work()
    except RequestError as error:
        return _refused(error, request)


def _change(request: Request, state: PolicyState, make: Callable[..., PolicyChange]) -> Response:
    """On record first, then made; what was then not made after all is put on record, too."""
    principal, begun = principal_of(request.scope), list[PolicyChange]()

    def record(change: PolicyChange) -> None:
        state.record_change(change, principal)
        begun.append(change)

    try:
        change = make(record=record)
    except Exception as error:
        for change in begun:
            state.record_failure(change, principal, error)
        raise
    status = 201 if change.action == "created" else 200
    etag = None if change.new_version is None else f'"{change.sha256}"'
    now = None if change.new_version is None else _folder(state).current().policies.get(change.name)
    missing = [] if now is None else state.names.missing(now.applies)
    reply = PolicyChanged(**{**asdict(change), "etag": etag, "missing": missing})
    return _reply(reply, etag, status)


def _refused(error: RequestError, request: Request) -> Response:
    reply = refusal(error, path_of(request.scope))
    if isinstance(error, ReadOnlyError):
        reply.headers["Allow"] = "GET"
    return reply


def _folder(state: PolicyState) -> PolicyFolder[Any]:
    if state.policies is None:
        message = "expected a folder of policies, and none is configured here: start the server with one"
        raise MissingError(message, at=(), reason="not_configured")
    return state.policies


def _list(state: PolicyState) -> Response:
    folder, names = _folder(state), state.names
    found = folder.current()
    data = [_described(policy, names) for policy in found.policies.values()]
    return _reply(PolicyList(version=found.version, problem=folder.problem, data=data))


def _show(state: PolicyState, name: str) -> Response:
    policy = _folder(state).current().policies.get(name)
    if policy is None:
        raise MissingError(f"expected the name of a policy in force, got {name[:80]!r}", at=("name",))
    return _reply(_described(policy, state.names), policy.etag)


def _described(policy: Policy, names: KnownNames) -> PolicyDocument:
    own = {name: getattr(policy, name) for name in PolicyDocument.model_fields if name != "missing"}
    return PolicyDocument(**own, missing=names.missing(policy.applies))


async def _document(request: Request) -> bytes:
    """The body, no more of it than a document may have."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in _YAML_TYPES:
        message = f"expected the policy as application/yaml or text/plain, got {kind[:80] or 'no type'!r}"
        raise RequestError(message, at=("headers", "content-type"))
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > MAX_BYTES:
            message = f"expected a document of at most {MAX_BYTES} bytes, got more"
            raise RequestError(message, at=(), reason="too_large")
    return content


def _reply(model: BaseModel, etag: str | None = None, status: int = 200) -> Response:
    headers = {"ETag": etag} if etag else {}
    return JSONResponse(model.model_dump(mode="json"), status_code=status, headers=headers)
