"""An API server over HTTP, with the semantics that matter to a client: versions and conflicts, watches that are cut off
or expire, selectors, patches, deletion in steps, and roles. Its objects are in a `Store`; nothing is validated.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

import yaml

from tests.kubernetes import rbac
from tests.kubernetes.patches import json_patched, merged
from tests.kubernetes.store import Object, Refused, Store, not_found

_CLUSTERED = ("nodes", "namespaces", "clusterroles", "clusterrolebindings", "persistentvolumes")
_STATUS_ONLY = ("pods", "nodes", "jobs.batch", "jobsets.jobset.x-k8s.io")
_BOOKMARK_S = 1.0
_PATCHES = {
    "application/merge-patch+json": False,
    "application/strategic-merge-patch+json": True,
}


class Request(NamedTuple):
    """One request, read. name "": of all."""

    verb: str
    resource: str
    kind: str
    namespace: str
    name: str
    subresource: str
    query: Mapping[str, str]
    body: Any
    content_type: str


class ApiServer:
    """Serves a store on a free port of this machine. A context manager.

    calls: how often each (verb, resource) was asked for. down: while set, connections are refused with an error.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.calls: dict[tuple[str, str], int] = {}
        self.down = threading.Event()
        self.before: Callable[[Request], None] = lambda request: None
        self._users = {secrets.token_hex(16): rbac.ADMIN}
        self._cut = 0
        self._stopping = threading.Event()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> ApiServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopping.set()
        self.cut_watches()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def kubeconfig(self, user: str = rbac.ADMIN, namespace: str = "default") -> str:
        """The text of a kubeconfig for this user."""
        token = next((token for token, name in self._users.items() if name == user), None) or secrets.token_hex(16)
        self._users[token] = user
        return yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "lab", "cluster": {"server": self.url}}],
                "users": [{"name": "user", "user": {"token": token}}],
                "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "user", "namespace": namespace}}],
                "current-context": "lab",
            }
        )

    def cut_watches(self) -> None:
        """Break all watches, as a load balancer or a restart would."""
        with self.store.changed:
            self._cut += 1
            self.store.changed.notify_all()

    # Requests -----------------------------------------------------------------------------------------------------

    def answer(self, user: str, request: Request) -> Object:
        """All but watches. Refused for what is no success."""
        rbac.check(self.store, user, request.verb, request.resource, request.namespace, request.subresource)
        place = (request.resource, request.namespace)
        match request.verb:
            case "get":
                return self.store.get(*place, request.name)
            case "list":
                return self._list(request)
            case "create":
                return self.store.create(*place, {**request.body, "kind": request.kind})
            case "update":
                return self._update(request, lambda old: request.body)
            case "patch":
                return self._update(request, lambda old: _patched(old, request))
            case "delete":
                return self._delete(request)
        raise Refused(405, "MethodNotAllowed", request.verb)

    def _list(self, request: Request) -> Object:
        with self.store.changed:
            revision = self.store.revision
            found = [each for each in self.store.list(request.resource, request.namespace) if _selected(each, request)]
        begin = int(request.query.get("continue", "0"))
        end = begin + int(request.query.get("limit", "500"))
        more = {"continue": str(end)} if end < len(found) else {}
        metadata = {"resourceVersion": str(revision), **more}
        return {"kind": f"{request.kind}List", "metadata": metadata, "items": found[begin:end]}

    def _update(self, request: Request, change: Callable[[Object], Object]) -> Object:
        """What is not the status changes only in the object itself, and the status only in its subresource."""

        def within(old: Object) -> Object:
            new = change(json.loads(json.dumps(old)))
            if request.subresource == "status":
                return {**old, "status": new.get("status", {}), "metadata": {**old["metadata"], **_version(new)}}
            if request.resource in _STATUS_ONLY:
                return {**new, "status": old.get("status", {})}
            return new

        return self.store.update(request.resource, request.namespace, request.name, within)

    def _delete(self, request: Request) -> Object:
        options = {**(request.body or {}), **{k: v for k, v in request.query.items() if k == "gracePeriodSeconds"}}
        found = self.store.get(request.resource, request.namespace, request.name)
        uid = options.get("preconditions", {}).get("uid", found["metadata"]["uid"])
        if uid != found["metadata"]["uid"]:
            raise Refused(409, "Conflict", f"the UID in the precondition ({uid}) does not match the UID in record")
        grace = options.get("gracePeriodSeconds")
        finalizer = "foregroundDeletion" if options.get("propagationPolicy") == "Foreground" else ""
        if request.resource == "pods":
            finalizer = ""
        return self.store.delete(
            request.resource, request.namespace, request.name, None if grace is None else int(grace), finalizer
        )

    def watch(self, request: Request) -> Iterator[Object]:
        """Events until the time that was asked for is over, or somebody cuts it."""
        until_s = time.monotonic() + float(request.query.get("timeoutSeconds", "1800"))
        bookmark_s = time.monotonic() + _BOOKMARK_S
        revision, cut = int(request.query.get("resourceVersion") or self.store.revision), self._cut
        while time.monotonic() < until_s:
            with self.store.changed:
                if self._cut != cut:
                    raise ConnectionResetError
                found = list(self.store.since(revision, request.resource))
                newest = self.store.revision
                if not found:
                    self.store.changed.wait(0.2)
            for at, what, item, old in found:
                if (event := _event(what, item, old, request)) is not None:
                    yield event
                revision = at
            if time.monotonic() > bookmark_s and request.query.get("allowWatchBookmarks") == "true":
                bookmark_s = time.monotonic() + _BOOKMARK_S
                revision = max(revision, newest)
                yield {
                    "type": "BOOKMARK",
                    "object": {"kind": request.kind, "metadata": {"resourceVersion": str(newest)}},
                }

    # HTTP ---------------------------------------------------------------------------------------------------------

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                try:
                    if server.down.is_set():
                        raise Refused(503, "ServiceUnavailable", "the server is currently unable to handle the request")
                    user = server._users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
                    if user is None:
                        raise Refused(401, "Unauthorized", "Unauthorized")
                    request = read_request(self.command, self.path, body, self.headers.get("Content-Type", ""))
                    key = (request.verb, request.resource)
                    server.calls[key] = server.calls.get(key, 0) + 1
                    server.before(request)
                    if request.verb == "watch":
                        rbac.check(server.store, user, "watch", request.resource, request.namespace)
                        self._stream(server.watch(request))
                    else:
                        created = request.verb == "create"
                        self._say(201 if created else 200, server.answer(user, request))
                except Refused as error:
                    self._say(error.status, _status(error))
                except (KeyError, ValueError, TypeError, IndexError) as error:
                    self._say(400, _status(Refused(400, "BadRequest", repr(error))))

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

            def _say(self, status: int, answer: Object) -> None:
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _stream(self, events: Iterator[Object]) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    try:
                        for event in events:
                            self._chunk(event)
                    except Refused as error:
                        self._chunk({"type": "ERROR", "object": _status(error)})
                    except ConnectionResetError:
                        self.close_connection = True
                        self.connection.close()
                        return
                    self.wfile.write(b"0\r\n\r\n")

            def _chunk(self, event: Object) -> None:
                data = json.dumps(event).encode() + b"\n"
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()

        return Handler


def read_request(method: str, path: str, body: bytes, content_type: str) -> Request:
    """What a request asks for. Refused for a path of nothing."""
    path, _, text = path.partition("?")
    query = {name: values[0] for name, values in parse_qs(text).items()}
    match [unquote(part) for part in path.strip("/").split("/")]:
        case ["api", "v1", *rest]:
            group = ""
        case ["apis", group, _, *rest]:
            pass
        case _:
            raise not_found(path)
    namespace = ""
    if len(rest) > 2 and rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    plural, name, subresource = [*rest, "", "", ""][:3]
    if plural in _CLUSTERED and namespace:
        raise not_found(path)
    verbs = {"GET": "get" if name else "list", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
    verb = "watch" if query.get("watch") in ("true", "1") and method == "GET" else verbs[method]
    resource = f"{plural}.{group}" if group else plural
    data = json.loads(body) if body else None
    kind = plural if data is None else data.get("kind", plural) if isinstance(data, dict) else plural
    return Request(verb, resource, kind, namespace, name, subresource, query, data, content_type.partition(";")[0])


def _patched(old: Object, request: Request) -> Object:
    if request.content_type == "application/json-patch+json":
        try:
            return json_patched(old, request.body)
        except (ValueError, KeyError, IndexError) as error:
            raise Refused(422, "Invalid", f"the server cannot apply the patch: {error}") from error
    if request.content_type not in _PATCHES:
        raise Refused(415, "UnsupportedMediaType", request.content_type)
    if _PATCHES[request.content_type] and "." in request.resource.partition(".")[2].partition("k8s.io")[0]:
        raise Refused(415, "UnsupportedMediaType", "custom resources take no strategic merge patch")
    patched: Object = merged(old, request.body, strategic=_PATCHES[request.content_type])
    return patched


def _version(new: Object) -> Object:
    return {key: new["metadata"][key] for key in ("resourceVersion", "uid") if key in new.get("metadata", {})}


def _event(what: str, item: Object, old: Object | None, request: Request) -> Object | None:
    """An object that a selector does not fit any more is, for who watches with it, deleted; and the other way round."""
    if request.namespace and item["metadata"].get("namespace") != request.namespace:
        return None
    fits, did = _selected(item, request), old is not None and _selected(old, request)
    if what == "MODIFIED" and fits != did:
        return {"type": "ADDED" if fits else "DELETED", "object": item}
    return {"type": what, "object": item} if fits or (what == "DELETED" and did) else None


def _selected(item: Object, request: Request) -> bool:
    labels = item["metadata"].get("labels") or {}
    wanted = [each.split("=", 1) for each in filter(None, request.query.get("labelSelector", "").split(","))]
    fields = [each.split("=", 1) for each in filter(None, request.query.get("fieldSelector", "").split(","))]
    return all(labels.get(name) == value for name, value in wanted) and all(
        _field(item, name) == value for name, value in fields
    )


def _field(item: Object, path: str) -> object:
    value: Any = item
    for step in path.split("."):
        value = value.get(step, "") if isinstance(value, dict) else ""
    return value


def _status(error: Refused) -> Object:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "message": error.message,
        "reason": error.reason,
        "code": error.status,
    }
