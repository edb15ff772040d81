"""The Hub's API for models: https://huggingface.co/docs/hub/api, as huggingface_hub calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from tests.hub.answers import Answer, error_answer, json_answer, refuse
from tests.hub.cards import find_card_errors, read_metadata
from tests.hub.commits import answer_commit, answer_preupload
from tests.hub.lfs import answer_batch, answer_completion, answer_verify, give_content
from tests.hub.repos import DATE, Commit, Repo, StoredFile, make_repo
from tests.hub.state import Call, HubState, describe_account


def answer_hub(hub: HubState, call: Call) -> Answer:
    """Answer a request to the Hub itself."""
    method, segments = call.method, call.segments
    match segments:
        case ("api", "whoami-v2"):
            return _answer_whoami(hub, call)
        case ("api", "validate-yaml"):
            return _answer_validation(call)
        case ("api", "complete_multipart"):
            return answer_completion(hub, call)
        case ("api", "repos", "create"):
            return _create_repo(hub, call)
        case ("api", "repos", "delete"):
            return _delete_repo(hub, call)
        case ("api", "models", owner, name, *rest):
            return _answer_model(hub, call, f"{owner}/{name}", rest)
        case (owner, name, "info", "lfs", "objects", "batch"):
            return answer_batch(hub, call, f"{owner}/{name.removesuffix('.git')}")
        case (owner, name, "info", "lfs", "objects", "verify"):
            return answer_verify(hub, call, f"{owner}/{name.removesuffix('.git')}")
        case (owner, name, "resolve", revision, *path) if method in ("GET", "HEAD"):
            return _resolve(hub, call, f"{owner}/{name}", revision, "/".join(path))
        case _:
            return error_answer(404, f"Sorry, we can't find the page: {'/'.join(segments)}")


def _answer_model(hub: HubState, call: Call, id: str, rest: list[str]) -> Answer:
    reading: dict[str, Callable[..., Answer]] = {
        "revision": _answer_info,
        "tree": _answer_tree,
        "commits": _answer_commits,
        "refs": _answer_refs,
        "discussions": _answer_discussions,
        "auth-check": _answer_auth_check,
    }
    changing: dict[tuple[str, str], Callable[..., Answer]] = {
        ("POST", "preupload"): answer_preupload,
        ("POST", "commit"): answer_commit,
        ("POST", "paths-info"): _answer_paths,
        ("POST", "branch"): _create_branch,
        ("DELETE", "branch"): _delete_branch,
        ("POST", "tag"): _create_tag,
        ("DELETE", "tag"): _delete_tag,
        ("PUT", "settings"): _change_settings,
    }
    if call.method == "GET":
        if not rest:
            return _answer_info(hub, call, id, "main")
        if rest[0] in reading:
            return reading[rest[0]](hub, call, id, *rest[1:])
    elif rest and (call.method, rest[0]) in changing:
        return changing[call.method, rest[0]](hub, call, id, *rest[1:])
    return error_answer(404, f"{call.method} {'/'.join(rest)} is not known to this server")


def _answer_whoami(hub: HubState, call: Call) -> Answer:
    account = hub.account(call)
    if account is None:
        raise refuse(401, "Invalid username or password.")
    return json_answer(describe_account(account))


def _answer_validation(call: Call) -> Answer:
    content = json.loads(call.body)["content"]
    errors = [{"message": message} for message in find_card_errors(content)]
    if errors:
        return json_answer({"errors": errors, "warnings": []}, status=400)
    empty = not read_metadata(content)
    warnings = [{"message": "empty or missing yaml metadata in repo card"}] if empty else []
    return json_answer({"errors": [], "warnings": warnings})


def _create_repo(hub: HubState, call: Call) -> Answer:
    request, account = json.loads(call.body), hub.account(call)
    if account is None:
        raise refuse(401, "Invalid username or password.")
    owner = request.get("organization") or account.user
    id = f"{owner}/{request['name']}"
    if not account.writes(owner):
        message = f'You don\'t have the rights to create a model under the namespace "{owner}"'
        raise refuse(403, message)
    document = {"url": f"{hub.endpoint}/{id}", "name": id, "id": id}
    if id in hub.repos:
        headers = {"X-Error-Message": "You already created this model repo"}
        error = {"error": "You already created this model repo", **document}
        return json_answer(error, status=409, headers=headers)
    private = request.get("visibility", "public") == "private"
    hub.repos[id] = make_repo(id, {}, author=account.user, private=private)
    return json_answer(document)


def _delete_repo(hub: HubState, call: Call) -> Answer:
    request = json.loads(call.body)
    owner = request.get("organization") or hub.author(call)
    repo = hub.writable(call, f"{owner}/{request['name']}")
    del hub.repos[repo.id]
    return json_answer({})


def _answer_info(hub: HubState, call: Call, id: str, revision: str) -> Answer:
    repo = hub.visible(call, id)
    commit = repo.find(revision)
    card = commit.files.get("README.md")
    metadata = read_metadata(card.content.decode()) if card else {}
    blobs = call.asks("blobs")
    document = {
        "_id": f"id-of-{id}",
        "id": id,
        "modelId": id,
        "author": repo.owner,
        "sha": commit.oid,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "createdAt": DATE,
        "lastModified": DATE,
        "tags": _tags(metadata),
        "cardData": metadata or None,
        "siblings": [
            {"rfilename": path, **(_blob(file) if blobs else {})}
            for path, file in sorted(commit.files.items())
        ],
    }
    named = {key: metadata[key] for key in ("library_name", "pipeline_tag") if key in metadata}
    return json_answer({**document, **named})


def _tags(metadata: dict[str, Any]) -> list[str]:
    bases = metadata.get("base_model") or []
    bases = bases if isinstance(bases, list) else [bases]
    relation = metadata.get("base_model_relation")
    return [
        *metadata.get("tags", []),
        *(f"base_model:{base}" for base in bases),
        *(f"base_model:{relation}:{base}" for base in bases if relation),
        *([f"license:{metadata['license']}"] if "license" in metadata else []),
    ]


def _blob(file: StoredFile) -> dict[str, Any]:
    document: dict[str, Any] = {"size": len(file.content), "blobId": file.oid}
    if file.lfs:
        lfs = {"sha256": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
        document["lfs"] = lfs
    return document


def _entry(path: str, file: StoredFile) -> dict[str, Any]:
    document = {"type": "file", "path": path, "oid": file.oid, "size": len(file.content)}
    if file.lfs:
        lfs = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
        return {**document, "lfs": lfs}
    return document


def _entries(commit: Commit) -> dict[str, dict[str, Any]]:
    """All files and folders of a commit by path."""
    entries = {path: _entry(path, file) for path, file in commit.files.items()}
    for path in list(commit.files):
        pieces = path.split("/")[:-1]
        for depth in range(1, len(pieces) + 1):
            folder = "/".join(pieces[:depth])
            entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
    return dict(sorted(entries.items()))


def _answer_tree(hub: HubState, call: Call, id: str, revision: str, *path: str) -> Answer:
    """List a folder, page after page; the next one is named as GitHub does it."""
    commit = hub.visible(call, id).find(revision)
    folder = "/".join(path)
    inside = f"{folder}/" if folder else ""
    entries = [
        entry
        for name, entry in _entries(commit).items()
        if name.startswith(inside) and (call.asks("recursive") or "/" not in name[len(inside) :])
    ]
    if folder and not entries:
        raise refuse(404, f"{folder} does not exist on {revision}", code="EntryNotFound")
    start = int(call.query.get("cursor", ["0"])[0])
    end = start + hub.page_entries
    headers = {}
    if end < len(entries):
        query = urlencode({"recursive": call.asks("recursive"), "cursor": end})
        address = f"{hub.endpoint}/api/models/{id}/tree/{commit.oid}"
        address += f"/{folder}" if folder else ""
        headers["Link"] = f'<{address}?{query}>; rel="next"'
    return json_answer(entries[start:end], headers=headers)


def _answer_paths(hub: HubState, call: Call, id: str, revision: str) -> Answer:
    entries = _entries(hub.visible(call, id).find(revision))
    paths = call.form().get("paths", [])
    return json_answer([entries[path.rstrip("/")] for path in paths if path.rstrip("/") in entries])


def _answer_commits(hub: HubState, call: Call, id: str, revision: str) -> Answer:
    repo = hub.visible(call, id)
    return json_answer(
        [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": commit.description,
                "authors": [{"user": commit.author}],
                "date": DATE,
            }
            for commit in repo.history(repo.find(revision))
        ]
    )


def _answer_refs(hub: HubState, call: Call, id: str) -> Answer:
    repo = hub.visible(call, id)

    def listed(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
            for ref, oid in repo.refs.items()
            if ref.startswith(prefix)
        ]

    document = {"branches": listed("refs/heads/"), "tags": listed("refs/tags/"), "converts": []}
    if call.asks("include_prs"):
        document["pullRequests"] = listed("refs/pr/")
    return json_answer(document)


def _answer_discussions(hub: HubState, call: Call, id: str, number: str = "") -> Answer:
    repo = hub.visible(call, id)
    documents = [
        {
            "num": each.number,
            "title": each.title,
            "author": {"name": each.author},
            "createdAt": DATE,
            "status": "open",
            "isPullRequest": True,
            "repo": {"name": id, "type": "model"},
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": [],
            "events": [],
        }
        for each in repo.pull_requests
    ]
    if number:
        found = [each for each in documents if str(each["num"]) == number]
        return json_answer(found[0]) if found else error_answer(404, "Discussion not found")
    return json_answer({"count": len(documents), "start": 0, "discussions": documents})


def _answer_auth_check(hub: HubState, call: Call, id: str, right: str = "read") -> Answer:
    if right == "write":
        hub.writable(call, id)
    else:
        hub.readable(call, id)
    return json_answer({})


def _create_branch(hub: HubState, call: Call, id: str, branch: str) -> Answer:
    repo, ref = hub.writable(call, id), f"refs/heads/{branch}"
    if branch.startswith("refs/"):
        raise refuse(400, f"Invalid reference for a branch: {branch}")
    if ref in repo.refs:
        raise refuse(409, f"Reference already exists: {ref}")
    repo.refs[ref] = repo.find(json.loads(call.body or b"{}").get("startingPoint", "main")).oid
    return json_answer({})


def _delete_branch(hub: HubState, call: Call, id: str, branch: str) -> Answer:
    if branch == "main":
        raise refuse(403, "The main branch cannot be deleted")
    return _delete_ref(hub.writable(call, id), f"refs/heads/{branch}")


def _create_tag(hub: HubState, call: Call, id: str, revision: str) -> Answer:
    repo, ref = hub.writable(call, id), f"refs/tags/{json.loads(call.body)['tag']}"
    oid = repo.find(revision).oid
    if ref in repo.refs:
        raise refuse(409, f"Tag reference exists already: {ref}")
    repo.refs[ref] = oid
    return json_answer({})


def _delete_tag(hub: HubState, call: Call, id: str, tag: str) -> Answer:
    return _delete_ref(hub.writable(call, id), f"refs/tags/{tag}")


def _delete_ref(repo: Repo, ref: str) -> Answer:
    if ref not in repo.refs:
        raise refuse(404, f"Invalid rev id: {ref}", code="RevisionNotFound")
    del repo.refs[ref]
    return json_answer({})


def _change_settings(hub: HubState, call: Call, id: str) -> Answer:
    repo, request = hub.writable(call, id), json.loads(call.body)
    if "visibility" in request:
        repo.private = request["visibility"] == "private"
    if "private" in request:
        repo.private = bool(request["private"])
    if "gated" in request:
        repo.gated = bool(request["gated"])
    return json_answer({"private": repo.private})


def _resolve(hub: HubState, call: Call, id: str, revision: str, path: str) -> Answer:
    """Give a small file itself, and the address in the storage of a large one."""
    repo = hub.readable(call, id)
    commit = repo.find(revision)
    file = commit.files.get(path)
    headers = {"X-Repo-Commit": commit.oid}
    if file is None:
        answer = error_answer(404, "Entry not found", code="EntryNotFound", headers=headers)
        return answer
    if not file.lfs:
        return give_content(call, file.content, {**headers, "ETag": f'"{file.oid}"'})
    location = f"{hub.storage_endpoint}/lfs/{id}/{file.sha256}?signature=of-the-hub"
    linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
    return Answer(302, b"", {**headers, **linked, "Location": location, "ETag": f'"{file.oid}"'})
