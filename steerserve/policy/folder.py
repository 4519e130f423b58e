"""The folder that the policies in force come from: looked at again and again, changed with care."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from steerserve.errors import (
    MissingError,
    PolicyError,
    ReadOnlyError,
    RequestError,
    SteerserveError,
    UnavailableError,
)

from .document import Mode, Policy, parse_policy, read_policy
from .files import Listing, PolicyFile, list_folder, locked, read_folder, read_steady, remove_file, write_file
from .metrics import count_failed_reload, show_policies
from .policy_set import PolicySet, version_of
from .precondition import check_precondition

__all__ = ["Check", "PolicyChange", "PolicyFolder", "unrecorded"]

logger = logging.getLogger(__name__)

Action = Literal["created", "replaced", "deleted"]
Enforced = TypeVar("Enforced")
Check = Callable[[Sequence[Policy]], Enforced]

# A file system's clock is coarse: a file written this lately may be written again and look the same.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class PolicyChange:
    """One policy created, replaced or deleted.

    `sha256` is of the document put or deleted; `mode` of the one put, None where one was deleted;
    `set_version` of all policies once it is made.
    """

    name: str
    action: Action
    old_version: int | None
    new_version: int | None
    mode: Mode | None
    sha256: str
    set_version: str


def unrecorded(_: object) -> None:
    """The record of a change where none is kept."""


class PolicyFolder(Generic[Enforced]):
    """All or nothing: what is in force is always one whole content of the folder that `check` accepted.

    Args:
        path: the folder; one file for each policy.
        check: what these policies come to, kept as `enforced`; raises a PolicyError if they cannot all be.
        every: seconds between two looks at the folder.
    Raises: PolicyError naming the file and field, if the folder as it is now cannot be enforced.

    Attributes:
        problem: why the folder's present content is not what is in force; None where it is.
        record: called, in whatever thread looks, with what is about to take force because the folder's files
            changed. Where it raises, what was in force stays, and the next look tries again.
    """

    def __init__(self, path: Path | str, check: Check[Enforced], *, every: float = 0.5) -> None:
        self.path = Path(path)
        self.problem: str | None = None
        self.record: Callable[[Enforced], None] = unrecorded
        self._check = check
        self._every = every
        self._reading = threading.Lock()
        self._complaint: tuple[str | None, str] | None = None
        listing, files = read_steady(self.path)
        self._seen = _settled(listing)
        # Both in one: whoever reads them gets two that belong together.
        self._now = self._checked(PolicySet.of(parse_policy(f.path.name, f.content) for f in files.values()))
        self._publish(self._now)
        self._next_look = time.monotonic() + every

    def current(self) -> PolicySet:
        """The policies in force. One caller looks whether they changed, while others go on with the last."""
        self.look()
        return self._now[0]

    @property
    def enforced(self) -> Enforced:
        """What `check` made of the policies in force; never looks at the folder."""
        return self._now[1]

    @property
    def is_due(self) -> bool:
        """Whether `look` would go to the disk now."""
        return time.monotonic() >= self._next_look and not self._reading.locked()

    def look(self) -> None:
        """See whether the folder changed, unless that was done lately or another thread is at it."""
        if time.monotonic() >= self._next_look and self._reading.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._reading.release()

    def put(
        self,
        name: str,
        content: bytes,
        *,
        if_match: str | None = None,
        if_none_match: str | None = None,
        record: Callable[[PolicyChange], None] = unrecorded,
    ) -> PolicyChange:
        """Create or replace one policy; in force when this returns.

        Args:
            content: the document, YAML in UTF-8.
            if_match: the ETag of the policy that is replaced, or `*`; as in HTTP.
            if_none_match: `*` to create a policy and never replace one.
            record: called with the change once nothing but the disk can refuse it, and before anything is
                written. What it raises is raised, and nothing changes.
        Raises: RequestError naming the field; StaleError, ReadOnlyError or UnavailableError.
        """
        policy = read_policy(name, content)
        with self._changing() as files:
            old = files.get(name)
            check_precondition(old.sha256 if old else None, if_match, if_none_match)
            old_version = self._version(name, old)
            if old_version is not None and policy.version <= old_version:
                message = f"expected `version` > {old_version}, the one in place, got {policy.version}"
                raise RequestError(message, at=("version",))
            changed = self._would_be(name, files, policy)
            if old is not None:
                _check_own(old)
            action: Action = "replaced" if old else "created"
            new = policy.version, policy.mode, policy.sha256
            change = PolicyChange(name, action, old_version, *new, changed[0].version)
            record(change)
            write_file(old.path if old else self.path / f"{name}.yaml", content)
            self._force(changed)
        return change

    def delete(
        self,
        name: str,
        *,
        if_match: str | None = None,
        record: Callable[[PolicyChange], None] = unrecorded,
    ) -> PolicyChange:
        """Take one policy out of force.

        Args: if_match: the ETag of the policy, or `*`; as in HTTP. record: as for `put`.
        Raises: MissingError, StaleError, ReadOnlyError or UnavailableError.
        """
        with self._changing() as files:
            old = files.get(name)
            if old is None:
                raise MissingError(f"expected the name of a policy, got {name[:80]!r}", at=("name",))
            check_precondition(old.sha256, if_match)
            _check_own(old)
            changed = self._would_be(name, files, None)
            gone = self._version(name, old), None, None, old.sha256
            change = PolicyChange(name, "deleted", *gone, changed[0].version)
            record(change)
            remove_file(old.path)
            self._force(changed)
        return change

    def _look(self) -> None:
        """Take over what the folder holds now, or say why not. A failure of any kind leaves the last set."""
        fingerprint = None
        try:
            if list_folder(self.path) == self._seen:
                return
            listing, files = read_steady(self.path)
            fingerprint = _fingerprint(files)
            self._seen = _settled(listing)
            if fingerprint != self._now[0].version:
                found = self._checked(PolicySet.of(self._policy(*item) for item in files.items()))
                self.record(found[1])
                self._publish(found)
            self.problem = self._complaint = None
        except Exception as error:
            self._complain(fingerprint, error)
        finally:
            self._next_look = time.monotonic() + self._every

    def _complain(self, fingerprint: str | None, error: Exception) -> None:
        """Show what is wrong, and log and count it once for each content."""
        # What lies there may be sound, and what failed around it may pass.
        if fingerprint is None or not isinstance(error, PolicyError):
            self._seen = None
        known = isinstance(error, SteerserveError)
        self.problem = str(error) if known else repr(error)
        complaint = (fingerprint, self.problem)
        if complaint != self._complaint:
            self._complaint = complaint
            count_failed_reload()
            logger.error("Policies stay as they were: %s", self.problem, exc_info=None if known else error)

    def _checked(self, policies: PolicySet) -> tuple[PolicySet, Enforced]:
        return policies, self._check(tuple(policies.policies.values()))

    def _policy(self, name: str, file: PolicyFile) -> Policy:
        """Parsed, unless it is in force as it is."""
        known = self._now[0].policies.get(name)
        if known is not None and known.sha256 == file.sha256:
            return known
        return parse_policy(file.path.name, file.content)

    def _publish(self, checked: tuple[PolicySet, Enforced]) -> None:
        self._now = checked
        policies = checked[0]
        show_policies(policies)
        names = [f"{p.name} v{p.version} {p.mode}" for p in policies.policies.values()]
        logger.info("Policies %s in force: %s", policies.version, ", ".join(names) or "none")

    @contextmanager
    def _changing(self) -> Iterator[dict[str, PolicyFile]]:
        """The files as they are, while no other writer changes them."""
        with locked(self.path):
            try:
                files = read_folder(self.path)
            except PolicyError as error:
                raise _unsound(error) from None
            yield files

    def _would_be(
        self, name: str, files: Mapping[str, PolicyFile], policy: Policy | None
    ) -> tuple[PolicySet, Enforced]:
        """The whole set once this policy takes the place of what bears its name."""
        try:
            policies = [self._policy(other, file) for other, file in files.items() if other != name]
        except PolicyError as error:
            raise _unsound(error) from None
        changed = PolicySet.of([*policies, policy] if policy else policies)
        try:
            return self._checked(changed)
        except PolicyError as error:
            message = f"expected policies that can be enforced together: {error}"
            raise RequestError(message, at=(), reason="policy") from None

    def _force(self, checked: tuple[PolicySet, Enforced]) -> None:
        """Publish what was just written; a look that began before the writing must not undo it."""
        with self._reading:
            self._seen = self.problem = self._complaint = None
            self._publish(checked)

    def _version(self, name: str, file: PolicyFile | None) -> int | None:
        """The version in place; where the file is broken, that of the policy it stood for."""
        if file is None:
            return None
        try:
            return self._policy(name, file).version
        except PolicyError:
            known = self._now[0].policies.get(name)
            return known.version if known else None


def _check_own(file: PolicyFile) -> None:
    """A link is somebody's, who points it elsewhere with the next change: a ConfigMap's, for one."""
    if file.path.is_symlink():
        message = f"expected a file to change, `{file.path.name}` is a link: change what it comes from"
        raise ReadOnlyError(message, at=(), reason="read_only")


def _unsound(error: PolicyError) -> UnavailableError:
    message = f"expected the folder's other policies to be sound, mend or delete this one first: {error}"
    return UnavailableError(message, at=(), reason="policy")


def _fingerprint(files: Mapping[str, PolicyFile]) -> str:
    """The version of the set that these files would be."""
    return version_of({name: file.sha256 for name, file in files.items()})


def _settled(listing: Listing) -> Listing | None:
    """The listing, if another write would show in it."""
    newest = max((modified for _, modified, *_ in listing), default=0)
    return listing if newest < time.time_ns() - _SETTLED_NS else None
