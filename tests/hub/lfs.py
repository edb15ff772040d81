"""Large files: which are known already, where the others go, and their parts."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from tests.hub.answers import Answer, json_answer, refuse, storage_error
from tests.hub.repos import Repo
from tests.hub.state import Call, HubState, Upload

LFS_JSON = {"Content-Type": "application/vnd.git-lfs+json"}


def answer_batch(hub: HubState, call: Call, id: str) -> Answer:
    """Say for each large file whether it is known, or where to send it.

    Without a ref it is meant for a pull request, for which being able to read is enough.
    """
    request = json.loads(call.body)
    repo = hub.writable(call, id, by_pull_request="ref" not in request)
    objects = [_place(hub, repo, each["oid"], each["size"]) for each in request["objects"]]
    multipart = any("chunk_size" in _header(each) for each in objects)
    transfer = "multipart" if multipart else "basic"
    document = {"transfer": transfer, "objects": objects, "hash_algo": "sha256"}
    return json_answer(document, headers=LFS_JSON)


def _header(placed: dict[str, Any]) -> dict[str, str]:
    header: dict[str, str] = placed.get("actions", {}).get("upload", {}).get("header", {})
    return header


def _place(hub: HubState, repo: Repo, oid: str, size: int) -> dict[str, Any]:
    if oid in repo.objects:
        return {"oid": oid, "size": size, "authenticated": True}
    verify = {"href": f"{hub.endpoint}/{repo.id}.git/info/lfs/objects/verify"}
    if size <= hub.multipart_above:
        href = f"{hub.storage_endpoint}/lfs/{repo.id}/{oid}?signature=of-the-hub"
        return {
            "oid": oid,
            "size": size,
            "authenticated": True,
            "actions": {"upload": {"href": href}, "verify": verify},
        }
    # A new batch starts anew, as on the Hub: the parts of an earlier one are not found again.
    upload_id = f"upload{len(hub.uploads) + 1}"
    hub.uploads[upload_id] = Upload(repo, oid)
    where = f"{hub.storage_endpoint}/lfs/{repo.id}/{oid}?uploadId={upload_id}"
    parts = range(1, math.ceil(size / hub.part_bytes) + 1)
    header = {"chunk_size": str(hub.part_bytes)}
    header |= {str(part): f"{where}&partNumber={part}" for part in parts}
    href = f"{hub.endpoint}/api/complete_multipart?uploadId={upload_id}"
    return {
        "oid": oid,
        "size": size,
        "authenticated": True,
        "actions": {"upload": {"href": href, "header": header}, "verify": verify},
    }


def answer_verify(hub: HubState, call: Call, id: str) -> Answer:
    """Confirm that an object is there, whole."""
    request = json.loads(call.body)
    repo = hub.visible(call, id)
    content = repo.objects.get(request["oid"])
    if content is None or len(content) != request["size"]:
        raise refuse(404, "LFS object not found or of another size")
    return json_answer({}, headers=LFS_JSON)


def answer_completion(hub: HubState, call: Call) -> Answer:
    """Join the parts of a large file; the request is authorized by its address."""
    request = json.loads(call.body)
    upload = hub.uploads[call.query["uploadId"][0]]
    numbers = [each["partNumber"] for each in request["parts"]]
    etags = [each["etag"] for each in request["parts"]]
    if numbers != sorted(upload.parts) or etags != [_etag(upload.parts[n]) for n in numbers]:
        raise refuse(400, "One or more of the specified parts could not be found.")
    content = b"".join(upload.parts[number] for number in numbers)
    if hashlib.sha256(content).hexdigest() != upload.sha256:
        raise refuse(400, "The content does not have the announced SHA-256.")
    upload.repo.objects[upload.sha256] = content
    upload.parts.clear()
    return json_answer({"success": True})


def answer_storage(hub: HubState, call: Call) -> Answer:
    """The object store: takes and gives whole objects and parts, by signed addresses."""
    if len(call.segments) != 4 or call.segments[0] != "lfs":
        return storage_error(404, "NoSuchKey", "The specified key does not exist.")
    _, owner, name, oid = call.segments
    repo = hub.repos[f"{owner}/{name}"]
    if call.method in ("GET", "HEAD"):
        if oid not in repo.objects:
            return storage_error(404, "NoSuchKey", "The specified key does not exist.")
        return give_content(call, repo.objects[oid], {"ETag": f'"{oid}"'})
    if call.method != "PUT":
        return storage_error(405, "MethodNotAllowed", "The method is not allowed.")
    if "authorization" in call.headers:
        # As S3 does, which takes either a signature or a header.
        return storage_error(400, "InvalidArgument", "Only one auth mechanism is allowed.")
    if "uploadId" in call.query:
        upload = hub.uploads[call.query["uploadId"][0]]
        upload.parts[int(call.query["partNumber"][0])] = call.body
    else:
        if hashlib.sha256(call.body).hexdigest() != oid:
            return storage_error(400, "BadDigest", "The SHA-256 did not match the content.")
        repo.objects[oid] = call.body
    return Answer(200, b"", {"ETag": _etag(call.body)})


def give_content(call: Call, content: bytes, headers: dict[str, str]) -> Answer:
    """Give a file, or the part of it that a Range header asks for (`bytes=first-last`)."""
    wanted = call.headers.get("range", "")
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    if not wanted.startswith("bytes="):
        return Answer(200, content, headers)
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start, end = int(first or 0), min(int(last or len(content) - 1), len(content) - 1)
    if start >= len(content):
        return Answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
    return Answer(206, content[start : end + 1], headers)


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'
