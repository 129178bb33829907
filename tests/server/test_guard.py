"""What every request passes: keys, bodies, HEAD, other pages, ids."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from typing import Any

import httpx
import pytest
from serving import listening
from sketcher import Sketcher, ask, asking

from max_diffusion import RequestError
from max_diffusion.serving.http import ServerSettings
from max_diffusion.serving.http.backend import VideoDescription

PATH = "/v1/images/generations"
EDITS, VIDEOS = "/v1/images/edits", "/v1/videos"
BODY = {"prompt": "ein grüner Stern", "seed": 1}
JSON = {"Content-Type": "application/json"}
PAGE = "https://example.org"
KEY = "sk-test"


def send(content: bytes, **headers: str) -> httpx.Response:
    return asyncio.run(
        ask(Sketcher(), "POST", PATH, content=content, headers=JSON | headers)
    )


def get(method: str, path: str, **options: Any) -> httpx.Response:
    return asyncio.run(ask(Sketcher(), method, path, **options))


# Bodies.


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(BODY).encode(),
        json.dumps(BODY, ensure_ascii=False).encode("utf-8"),
        json.dumps(BODY, ensure_ascii=False).encode("utf-8-sig"),
        b'{"prompt": "ein gr\\u00fcner Stern", "seed": 1}\r\n',
    ],
    ids=["ascii", "utf-8", "bom", "escapes"],
)
def test_bodies_in_utf_8_are_read(content: bytes) -> None:
    sketcher = Sketcher()
    response = asyncio.run(ask(sketcher, "POST", PATH, content=content, headers=JSON))
    assert response.status_code == 200, response.text
    assert sketcher.drawn[0][0].prompts == ("ein grüner Stern",)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (json.dumps(BODY, ensure_ascii=False).encode("latin-1"), "byte 0xfc at 18"),
        (json.dumps(BODY).encode("utf-16"), "byte 0xff at 0"),
        (json.dumps(BODY).encode("utf-16-le"), "a zero byte, as in UTF-16"),
        (json.dumps(BODY).encode("utf-32-be"), "a zero byte, as in UTF-16"),
        (b'{"prompt": "\xff"}', "byte 0xff at 12"),
        (b'{"prompt": "\xed\xa0\x80"}', "byte 0xed at 12"),
        (b'{"prompt": "gr\xc3', "byte 0xc3 at 14"),
    ],
    ids=["latin-1", "utf-16", "utf-16-le", "utf-32", "ff", "half", "cut"],
)
def test_other_encodings_are_named(content: bytes, got: str) -> None:
    response = send(content)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"] == (
        f"body: expected JSON in UTF-8, got {got}; encode it as UTF-8"
    )
    assert error["code"] == "invalid_encoding"


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "zstd", "gzip, identity"])
def test_compressed_bodies_are_named(coding: str) -> None:
    response = send(
        gzip.compress(json.dumps(BODY).encode()), **{"Content-Encoding": coding}
    )
    assert response.status_code == 415
    error = response.json()["error"]
    assert error["message"] == (
        f"body: expected plain JSON, got Content-Encoding: {coding}; send it "
        "uncompressed"
    )
    assert error["code"] == "unsupported_encoding"
    assert response.headers["accept-encoding"] == "identity"


def test_a_compressed_body_that_does_not_say_so_is_named() -> None:
    response = send(gzip.compress(json.dumps(BODY).encode()))
    assert response.status_code == 415
    error = response.json()["error"]
    assert error["message"] == (
        "body: expected plain JSON, got gzip; send it uncompressed"
    )
    assert error["code"] == "unsupported_encoding"


@pytest.mark.parametrize("path", [EDITS, VIDEOS])
@pytest.mark.parametrize("coding", ["gzip", None])
def test_a_compressed_form_is_named(path: str, coding: str | None) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    headers |= {} if coding is None else {"Content-Encoding": coding}
    content = gzip.compress(b"--b--")
    response = asyncio.run(
        ask(Sketcher(), "POST", path, content=content, headers=headers)
    )
    assert response.status_code == 415
    got = "gzip" if coding is None else f"Content-Encoding: {coding}"
    assert response.json()["error"]["message"] == (
        f"body: expected plain multipart/form-data, got {got}; send it uncompressed"
    )


@pytest.mark.parametrize(
    ("path", "taken"),
    [
        (PATH, "application/json"),
        (EDITS, "multipart/form-data"),
        (VIDEOS, "application/json or multipart/form-data"),
    ],
)
@pytest.mark.parametrize("kind", ["multipart/mixed", "Multipart/Related"])
@pytest.mark.parametrize("content", [b"--b--", b"--b\r\n\r\n\xff\0\r\n--b--"])
def test_parts_that_are_no_form_are_named(
    path: str, taken: str, kind: str, content: bytes
) -> None:
    headers = {"Content-Type": f"{kind}; boundary=b"}
    response = asyncio.run(
        ask(Sketcher(), "POST", path, content=content, headers=headers)
    )
    assert response.status_code == 415
    assert response.json()["error"] == {
        "message": f"body: expected {taken}, got {kind}; send it as such, with this "
        "Content-Type",
        "type": "invalid_request_error",
        "param": "body",
        "code": "content_type",
    }


@pytest.mark.parametrize("coding", ["identity", "Identity", ""])
def test_a_body_that_says_it_is_plain_is_read(coding: str) -> None:
    content = json.dumps(BODY).encode()
    assert send(content, **{"Content-Encoding": coding}).status_code == 200


# HEAD.


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/openapi.json",
        "/health",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/v1/models",
        "/v1/models/demo",
        "/v1/models/other",
        "/images/none.png",
        "/nothing",
    ],
)
def test_head_is_get_without_its_body(path: str) -> None:
    whole, head = get("GET", path), get("HEAD", path)
    assert head.status_code == whole.status_code
    assert head.content == b""
    assert len(whole.content) == int(head.headers["content-length"]) > 0
    ignored = ("x-request-id",)
    assert {k: v for k, v in head.headers.items() if k not in ignored} == {
        k: v for k, v in whole.headers.items() if k not in ignored
    }


def test_head_of_pictures_that_are_kept() -> None:
    async def run() -> None:
        async with asking(Sketcher()) as client:
            body = BODY | {"response_format": "url"}
            url = (await client.post(PATH, json=body)).json()["data"][0]["url"]
            whole, head = await client.get(url), await client.head(url)
            assert head.status_code == 200
            assert head.headers["content-type"] == "image/png"
            assert int(head.headers["content-length"]) == len(whole.content)

    asyncio.run(run())


def test_head_over_a_socket() -> None:
    with listening(Sketcher()) as url, httpx.Client(base_url=url) as client:
        for _ in range(2):  # on one connection, which must stay in step
            assert client.head("/v1/models").content == b""
            assert client.get("/v1/models").json()["data"][0]["id"] == "demo"


def test_head_asks_for_the_key_as_well() -> None:
    settings = {"api_keys": (KEY,)}
    assert get("HEAD", "/v1/models", settings=settings).status_code == 401
    headers = {"Authorization": f"Bearer {KEY}"}
    found = get("HEAD", "/v1/models", settings=settings, headers=headers)
    assert found.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("HEAD", PATH, "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
    ],
)
def test_methods_that_there_are_are_told(method: str, path: str, allow: str) -> None:
    response = get(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == allow


@pytest.mark.parametrize(
    ("method", "path", "hint"),
    [
        ("POST", "/images/generations", "did you mean /v1/images/generations? "),
        ("POST", "/v1/v1/images/generations", "did you mean /v1/images/generations? "),
        ("POST", "/api/images/generations", "did you mean /v1/images/generations? "),
        ("GET", "/models", "did you mean /v1/models? "),
        ("GET", "/v1/images/generations", ""),
        ("POST", "/v1/images/upscales", ""),
        ("POST", "/v1/chat/completions", ""),
    ],
)
def test_a_wrong_base_url_is_told(method: str, path: str, hint: str) -> None:
    response = get(method, path)
    assert response.status_code in (404, 405)
    message = response.json()["error"]["message"]
    assert message.startswith(f"{method} {path}: ")
    assert message.endswith(f"; {hint}GET /docs lists what there is")


# Pages elsewhere.


def preflight(
    origin: str, extra: dict[str, str] | None = None, **settings: Any
) -> httpx.Response:
    headers = (extra or {}) | {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    return get("OPTIONS", PATH, headers=headers, settings=settings)


def test_a_browser_asks_what_it_may_send_without_a_key() -> None:
    found = preflight(PAGE, cors_origins=(PAGE,), api_keys=(KEY,))
    assert found.status_code == 200
    assert found.headers["access-control-allow-origin"] == PAGE
    assert "POST" in found.headers["access-control-allow-methods"]
    allowed = found.headers["access-control-allow-headers"]
    assert allowed == "authorization,content-type,x-stainless-os"
    assert "access-control-allow-credentials" not in found.headers
    assert "access-control-allow-private-network" not in found.headers


def test_a_public_page_that_is_allowed_may_ask_a_server_at_home() -> None:
    private = {"Access-Control-Request-Private-Network": "true"}
    found = preflight(PAGE, private, cors_origins=(PAGE,))
    assert found.status_code == 200
    assert found.headers["access-control-allow-private-network"] == "true"
    other = preflight("https://evil.org", private, cors_origins=(PAGE,))
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("origins", "origin", "answer"),
    [
        ((PAGE,), PAGE, PAGE),
        (
            (PAGE, "http://localhost:3000"),
            "http://localhost:3000",
            "http://localhost:3000",
        ),
        (("*",), PAGE, "*"),
        (("null",), "null", "null"),
        ((PAGE,), "https://example.org.evil.org", None),
        ((PAGE,), "http://example.org", None),
        ((PAGE,), "https://example.org:444", None),
        ((), PAGE, None),
    ],
)
def test_only_pages_of_these_origins_may_read(
    origins: tuple[str, ...], origin: str, answer: str | None
) -> None:
    found = preflight(origin, cors_origins=origins)
    assert found.headers.get("access-control-allow-origin") == answer
    assert (found.status_code == 200) == (answer is not None)
    for path in ("/v1/models", "/health", "/nothing"):
        headers = {"Origin": origin}
        found = get("GET", path, headers=headers, settings={"cors_origins": origins})
        assert found.headers.get("access-control-allow-origin") == answer


def test_errors_can_be_read_from_elsewhere_too() -> None:
    class Broken(Sketcher):
        async def describe(self) -> None:
            raise RuntimeError("defect")

    async def run() -> None:
        settings: dict[str, Any] = {"cors_origins": (PAGE,), "api_keys": (KEY,)}
        key = {"Authorization": f"Bearer {KEY}"}
        for headers, status in (({}, 401), (key, 500)):
            response = await ask(
                Broken(),
                "GET",
                "/v1/models",
                headers={"Origin": PAGE, **headers},
                settings=settings,
            )
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == PAGE
            exposed = response.headers["access-control-expose-headers"]
            assert exposed == "Retry-After, X-Request-Id"
            assert response.json()["error"]["message"]

    asyncio.run(run())


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "null",
        "https://example.org",
        "http://localhost:3000",
        "http://127.0.0.1:8080",
        "http://[::1]:8080",
        "https://xn--bcher-kva.example",
        "http://example.org:443",
        "chrome-extension://abcdefghijklmnop",
        "tauri://localhost",
    ],
)
def test_origins_as_browsers_send_them(origin: str) -> None:
    assert ServerSettings(cors_origins=(origin,)).cors_origins == (origin,)


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "example.org",
        "https://example.org/",
        "https://example.org/page",
        "https://Example.org",
        "HTTPS://example.org",
        "https://example.org:443",
        "http://example.org:80",
        "https://*.example.org",
        "https://a@example.org",
        "https://bücher.example",
        "https://example.org:",
        "https://",
        "https://a b",
        "::1",
    ],
)
def test_an_origin_that_would_never_match_is_refused(origin: str) -> None:
    message = re.escape(f"without a path, got {origin!r}")
    with pytest.raises(RequestError, match=message):
        ServerSettings(cors_origins=(origin,))


# A form, and text, a browser posts for any page without asking the server first.
UNASKED: dict[str, dict[str, Any]] = {
    "json": {"json": BODY},
    "form": {"files": {"prompt": (None, "a star")}},
    "text": {"content": json.dumps(BODY)},  # without a type, as a blob is sent
}


def from_page(
    path: str,
    headers: dict[str, str],
    settings: dict[str, Any] | None = None,
    **body: Any,
) -> tuple[httpx.Response, int]:
    """The answer to what a browser sends for a page, and how much was drawn."""
    sketcher = Sketcher(
        video=VideoDescription(9, 8.0, (9,)) if "video" in path else None
    )
    asked = ask(sketcher, "POST", path, headers=headers, settings=settings, **body)
    return asyncio.run(asked), len(sketcher.drawn)


@pytest.mark.parametrize(
    ("origin", "body", "path"),
    [
        *(("https://evil.example", body, PATH) for body in UNASKED),
        ("https://evil.example", "form", "/v1/images/edits"),
        ("https://evil.example", "form", "/v1/videos"),
        *(
            (origin, "json", PATH)
            for origin in ("null", "http://x:81", "http://x.evil")
        ),
        *((origin, "json", PATH) for origin in ("x", "//x")),  # no origins at all
    ],
)
def test_no_page_elsewhere_has_anything_drawn(
    origin: str, body: str, path: str
) -> None:
    answer, num_drawn = from_page(path, {"Origin": origin}, **UNASKED[body])
    assert (answer.status_code, num_drawn) == (403, 0)
    error = answer.json()["error"]
    assert error["message"] == (
        "server: expected a page of its own or of an allowed origin, got "
        f"{origin!r}; start the server with --cors-origin {origin} to allow it"
    )
    assert error["code"] == "origin_not_allowed"


def test_no_page_elsewhere_deletes_a_video() -> None:
    async def run() -> None:
        async with asking(Sketcher(video=VideoDescription(9, 8.0, (9,)))) as client:
            path = "/v1/videos"
            identifier = (await client.post(path, json={"prompt": "a"})).json()["id"]
            headers = {"Origin": PAGE, "Sec-Fetch-Site": "cross-site"}
            refused = await client.delete(f"{path}/{identifier}", headers=headers)
            assert refused.status_code == 403
            assert (await client.get(f"{path}/{identifier}")).status_code == 200

    asyncio.run(run())


@pytest.mark.parametrize(
    ("headers", "settings"),
    [
        ({}, {}),
        ({"Origin": "http://x"}, {}),
        ({"Origin": "https://x"}, {}),  # behind a proxy that ends TLS
        ({"Origin": "http://[::1]:8000", "Host": "[::1]:8000"}, {}),
        ({"Origin": "https://example.org", "Sec-Fetch-Site": "same-origin"}, {}),
        ({"Origin": PAGE}, {"cors_origins": (PAGE,)}),
        ({"Origin": "null"}, {"cors_origins": ("null",)}),
        ({"Origin": PAGE}, {"cors_origins": ("*",)}),
        ({"Origin": PAGE, "Authorization": f"Bearer {KEY}"}, {"api_keys": (KEY,)}),
    ],
)
def test_own_and_allowed_pages_and_other_clients_ask_as_ever(
    headers: dict[str, str], settings: dict[str, Any]
) -> None:
    answer, num_drawn = from_page(PATH, headers, settings, json=BODY)
    assert (answer.status_code, num_drawn) == (200, 1), answer.text


def test_a_page_elsewhere_needs_the_key_where_there_is_one() -> None:
    settings = {"api_keys": (KEY,)}
    answer, num_drawn = from_page(PATH, {"Origin": PAGE}, settings, json=BODY)
    assert (answer.status_code, num_drawn) == (401, 0)


def test_an_origin_without_end_is_not_told_whole() -> None:
    answer, _ = from_page(PATH, {"Origin": "https://" + "x" * 5000}, json=BODY)
    assert answer.status_code == 403
    assert len(answer.json()["error"]["message"]) < 400


# Ids.


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nothing", "/"])
def test_every_answer_has_an_id(path: str) -> None:
    ids = {get("GET", path).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [
        ("abc-123", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("a b", False),
        ("", False),
    ],
)
def test_an_id_that_the_client_brings_is_kept(given: str, is_kept: bool) -> None:
    found = get("GET", "/v1/models", headers={"X-Request-Id": given})
    assert (found.headers["x-request-id"] == given) == is_kept


def test_refusals_have_an_id_as_well() -> None:
    settings = {"api_keys": (KEY,), "max_body_bytes": 10}
    assert get("GET", "/v1/models", settings=settings).headers["x-request-id"]
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "mine"}
    large = get("POST", PATH, json=BODY, headers=headers, settings=settings)
    assert large.status_code == 413
    assert large.headers["x-request-id"] == "mine"


def test_the_log_names_the_request_that_failed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Sketcher):
        async def describe(self) -> None:
            raise RuntimeError("defect")

    headers = {"X-Request-Id": "mine"}
    response = asyncio.run(ask(Broken(), "GET", "/v1/models", headers=headers))
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["message"] == "the server failed; its log says why"
    assert error["code"] == "internal_error"
    assert "request mine has failed" in caplog.messages
