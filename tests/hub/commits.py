"""Commits: how files are to be sent, and the one request that makes all of them visible."""

from __future__ import annotations

import base64
import json
from typing import Any

from tests.hub.answers import Answer, json_answer, refuse
from tests.hub.cards import find_card_errors
from tests.hub.repos import REGULAR_BYTES, Commit, PullRequest, Repo, StoredFile
from tests.hub.state import Call, HubState


def answer_preupload(hub: HubState, call: Call, id: str, revision: str) -> Answer:
    """Say for each file whether it is LFS, and what the branch has under that name."""
    repo = hub.writable(call, id, by_pull_request=call.asks("create_pr"))
    commit = repo.commits[repo.refs[repo.branch(revision)]]
    answers = []
    for each in json.loads(call.body)["files"]:
        path, size, sample = each["path"], each["size"], base64.b64decode(each["sample"])
        lfs = repo.stores_as_lfs(commit, path, size, sample)
        there = commit.files.get(path)
        answers.append(
            {
                "path": path,
                "uploadMode": "lfs" if lfs else "regular",
                "shouldIgnore": False,
                "oid": None if there is None else there.sha256 if there.lfs else there.oid,
            }
        )
    return json_answer({"files": answers, "commitOid": commit.oid})


def answer_commit(hub: HubState, call: Call, id: str, revision: str) -> Answer:
    """Apply all operations, or none of them."""
    proposed = call.asks("create_pr")
    repo = hub.writable(call, id, by_pull_request=proposed)
    ref = repo.branch(revision)
    lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    head = repo.commits[repo.refs[ref]]
    parent = header.get("parentCommit")
    if parent is not None and parent != head.oid and not proposed:
        raise refuse(412, "A commit has happened since. Please refresh and try again.")
    files = _apply(repo, repo.commits[parent] if parent else head, lines)
    if "README.md" in files and (errors := find_card_errors(files["README.md"].content.decode())):
        raise refuse(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
    author, title, description = hub.author(call), header["summary"], header["description"]
    document: dict[str, Any] = {"success": True, "hookOutput": ""}
    if proposed:
        number = len(repo.pull_requests) + 1
        pull_request = PullRequest(number, title, description, author)
        repo.pull_requests.append(pull_request)
        ref = pull_request.ref
        document["pullRequestUrl"] = f"{hub.endpoint}/{id}/discussions/{number}"
    commit = repo.commit(
        ref, files, title=title, description=description, author=author, parent=parent or head.oid
    )
    document |= {"commitOid": commit.oid, "commitUrl": f"{hub.endpoint}/{id}/commit/{commit.oid}"}
    return json_answer(document)


def _apply(repo: Repo, base: Commit, lines: list[dict[str, Any]]) -> dict[str, StoredFile]:
    files = dict(base.files)
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "header":
            continue
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/"):
            raise refuse(400, f"Invalid path: {path}")
        if key == "file":
            files[path] = _regular(path, base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in repo.objects:
                raise refuse(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = StoredFile(repo.objects[value["oid"]], lfs=True)
        elif key == "deletedFile":
            if path not in files:
                message = f"A file with this name doesn't exist: {path}"
                raise refuse(404, message, code="EntryNotFound")
            del files[path]
        elif key == "deletedFolder":
            inside = [each for each in files if each.startswith(f"{path.rstrip('/')}/")]
            if not inside:
                message = f"A file with this name doesn't exist: {path}"
                raise refuse(404, message, code="EntryNotFound")
            for each in inside:
                del files[each]
        else:
            raise refuse(400, f"Unknown operation {key}")
    return files


def _regular(path: str, content: bytes) -> StoredFile:
    if len(content) > REGULAR_BYTES:
        raise refuse(400, f"Your push was rejected because {path} is larger than 10 MiB.")
    return StoredFile(content)
