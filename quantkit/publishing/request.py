"""What was asked for, and what of it can be refused before anything is read or sent."""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantkit.errors import PublishError
from quantkit.publishing.client import check_repo_name
from quantkit.report.usage import Place

MAIN = "main"

_VARIANT = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REF = re.compile(r"[A-Za-z0-9][\w./-]{0,95}", re.ASCII)
_RESERVED = frozenset({"report"})


@dataclass(frozen=True)
class Request:
    """The arguments of `publish`."""

    repo: str
    revision: str | None = None
    tag: str | None = None
    alias: str | None = None
    private: bool | None = None
    pull_request: bool = False
    variant: str | None = None
    replace: bool = False

    @property
    def branch(self) -> str:
        """The branch that is committed to."""
        return self.revision or MAIN

    @property
    def place(self) -> Place:
        """Where the artifact will lie."""
        revision = None if self.branch == MAIN else self.branch
        return Place(self.repo, on_hub=True, folder=self.variant or "", revision=revision)


def check_request(request: Request) -> None:
    """Refuse names that the Hub would not take, and wishes that exclude each other.

    Raises:
        PublishError: one of them.
    """
    check_repo_name(request.repo)
    check_ref("--revision", request.revision)
    check_ref("--tag", request.tag)
    check_alias(request.alias)
    variant = request.variant
    if variant is not None and (not _VARIANT.fullmatch(variant) or variant in _RESERVED):
        raise PublishError(
            f"--variant {variant!r} is no name for a folder: letters, digits, '-', '_' and '.', "
            f"and not 'report'"
        )
    if request.pull_request and (request.tag or request.alias):
        raise PublishError(
            "--pull-request goes without --tag and --alias: name the commit when it is merged"
        )
    names = [name for name in (request.tag, request.alias, request.branch) if name]
    if len(set(names)) < len(names):
        raise PublishError("--revision, --tag and --alias must be different names")


def check_alias(alias: str | None) -> None:
    """Refuse a name that must not move.

    Raises:
        PublishError: it is no name, or the main branch's.
    """
    check_ref("--alias", alias)
    if alias == MAIN:
        raise PublishError(f"--alias {MAIN}: this is the branch that commits go to")


def check_ref(option: str, name: str | None) -> None:
    """Refuse what cannot be the name of a branch or a tag.

    Raises:
        PublishError: it cannot.
    """
    if name is None:
        return
    odd = ".." in name or "//" in name or name.endswith(("/", ".", ".lock"))
    if odd or not _REF.fullmatch(name):
        raise PublishError(f"{option} {name!r} is no name of a branch or a tag")
