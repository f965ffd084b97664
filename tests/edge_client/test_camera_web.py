"""Cameras on web servers: pictures are opened like files, and other content is reported."""

from __future__ import annotations

import hashlib
import re
import ssl
import time

import pytest
import trustme
from PIL import Image, ImageCms

from edge_client.cameras import (
    Camera,
    CameraError,
    CameraFrame,
    decoder,
    http_fetch,
    live,
    open_camera,
    snapshots,
    video,
)
from edge_client.picture import Picture
from edge_client.retry import Retry
from tests.support.clips import scene
from tests.support.patience import PATIENCE_S
from tests.support.pictures import difference, photo, saved, turned
from tests.support.web_camera import (
    Behaviour,
    Request,
    WebCamera,
    page,
    part_of,
    picture,
    silence,
    silent_stream,
    stream,
    trickle,
)
from vlm_collab.geometry import Fit, Size
from vlm_collab.pictures.images import Codec

WAIT_S = PATIENCE_S
HASTY = Retry(first_s=0.02, longest_s=0.1)
JPEG = saved(scene(3), "JPEG", quality=95)
OTHER = saved(scene(4), "JPEG", quality=95)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Shorten the time-outs, which are seconds in practice."""
    monkeypatch.setattr(snapshots, "SNAPSHOT_S", 0.02)
    monkeypatch.setattr(live, "SILENCE_S", 0.3)
    monkeypatch.setattr(http_fetch, "SILENCE_S", 0.8)
    monkeypatch.setattr(http_fetch, "TOTAL_S", 1.2)
    monkeypatch.setattr(video, "OPEN_TIMEOUT_S", 0.8)
    monkeypatch.setattr(video, "READ_TIMEOUT_S", 0.8)


def view(picture: Picture) -> bytes:
    return picture.view(Size(112, 112), Fit.STRETCH, Codec.PNG, 90)


def taken(camera: Camera, after: int = 0) -> CameraFrame:
    frame = camera.take(after=after, wait_s=WAIT_S)
    assert frame is not None, camera.trouble
    return frame


def trouble(camera: Camera) -> str:
    """Wait for the camera's trouble, and return it."""
    until = time.monotonic() + WAIT_S
    while (reason := camera.trouble) is None and time.monotonic() < until:
        camera.take(after=camera._latest(), wait_s=0.02)
    assert reason is not None
    return reason


def comes_back(camera: Camera, after: int) -> None:
    """Wait until the camera delivers the other picture and has no trouble."""
    until = time.monotonic() + WAIT_S
    while True:
        frame = taken(camera, after)
        if difference(frame.picture.decoded(), scene(4)) < 4:
            break
        after = frame.number
        assert time.monotonic() < until
    assert camera.trouble is None


# ---- a picture is opened like a file -----------------------------------------------------------


def transparent() -> Image.Image:
    """A black drawing on a transparent background that hides a colour."""
    image = Image.new("RGBA", (64, 48), (200, 30, 30, 0))
    image.paste((0, 0, 0, 255), (20, 10, 40, 30))
    return image


PICTURES = {
    **{f"EXIF {o}": turned(photo(), o, quality=95) for o in range(1, 9)},
    **{f"EXIF {o}, PNG": turned(photo(), o, "PNG") for o in (2, 5)},
    **{f"EXIF {o}, WebP": turned(photo(), o, "WEBP", lossless=True) for o in (4, 7)},
    "transparent PNG": saved(transparent(), "PNG"),
    "transparent WebP": saved(transparent(), "WEBP", lossless=True, exact=True),
    "grey with a palette": saved(photo().quantize(16), "PNG"),
    "CMYK": saved(photo().convert("CMYK"), "JPEG", quality=95),
}


@pytest.mark.parametrize("data", PICTURES.values(), ids=PICTURES)
def test_a_picture_on_a_web_server_is_read_like_the_same_file(data):
    with WebCamera(picture(data)) as server, open_camera(server.url) as camera:
        frame = taken(camera)
    assert frame.picture.size == Picture.open(data).size
    assert frame.picture.original_bytes == len(data)
    assert view(frame.picture) == view(Picture.open(data))


def swapped_profile() -> bytes:
    """An RGB profile with red and blue swapped."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = data.index(b"rXYZ"), data.index(b"bXYZ")
    data[red : red + 4], data[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(data)


@pytest.mark.parametrize("serve", [picture, stream])
def test_colours_become_srgb(serve):
    data = saved(photo(128, 96), "JPEG", quality=95, icc_profile=swapped_profile())
    red, green, blue = photo(128, 96).split()
    with WebCamera(serve(data)) as server, open_camera(server.url) as camera:
        decoded = taken(camera).picture.decoded()
    assert difference(decoded, Image.merge("RGB", (blue, green, red))) < 12
    assert difference(decoded, photo(128, 96)) > 40


def test_the_newest_picture_is_taken():
    with WebCamera(picture(JPEG)) as server, open_camera(server.url) as camera:
        first = taken(camera)
        assert first.picture.name == f"{server.url}, picture {first.number}"
        later = camera.take(due=first.number + 5, wait_s=WAIT_S)
        assert later is not None
        assert later.number == later.latest >= first.number + 5
        server.do(picture(OTHER))
        until = time.monotonic() + WAIT_S
        while taken(camera, later.number).picture.original_bytes != len(OTHER):
            assert time.monotonic() < until


def animated() -> bytes:
    frames = [photo(), photo().rotate(90)]
    return saved(frames[0], "WEBP", save_all=True, append_images=frames[1:])


BLANK = "is blank"
NO_PICTURES: dict[str, tuple[Behaviour, str]] = {
    "a page": (page("Device Busy"), "the response is text/html, not a JPEG, PNG or WebP picture"),
    "a page with an error": (page("Device Busy", 503), "HTTP 503 Service Unavailable"),
    "half a picture": (part_of(JPEG, len(JPEG) // 2, sized=True), "was cut off"),
    "half a picture of unknown length": (
        part_of(JPEG, len(JPEG) // 2, sized=False),
        "it is cut short",
    ),
    "half, then nothing": (silence(JPEG[:2000]), r"no data for 0\.8 s|no picture for"),
    "nothing in it": (part_of(b"", 0, sized=True), "the response is empty"),
    "silence": (silence(), r"no data for 0\.8 s|no picture for .* does not answer"),
    "one byte after the other": (trickle(JPEG), r"not complete after 1\.2 s|no picture for"),
    "an animation": (picture(animated(), "image/webp"), "an animation of 2 frames"),
    "a picture of another kind": (picture(saved(photo(), "GIF"), "image/gif"), "image/gif, not a"),
    "a black picture": (picture(saved(Image.new("RGB", (640, 480)), "JPEG")), BLANK),
}


@pytest.mark.parametrize(("instead", "reason"), NO_PICTURES.values(), ids=NO_PICTURES)
def test_wrong_content_is_reported_and_the_camera_comes_back(instead, reason):
    news: list[str] = []
    with WebCamera(picture(JPEG)) as server:
        address = server.url.replace("//", "//me:secret@") + "?password=secret"
        with open_camera(address, news=news.append, retry=HASTY) as camera:
            before = taken(camera)
            assert camera.trouble is None
            server.do(instead)
            until = time.monotonic() + WAIT_S
            while not re.search(reason, trouble(camera)) and time.monotonic() < until:
                time.sleep(0.01)
            assert re.search(reason, trouble(camera))
            last = camera._latest()
            server.do(picture(OTHER))
            until = time.monotonic() + WAIT_S
            while taken(camera, last).picture.original_bytes != len(OTHER):
                assert time.monotonic() < until
            assert camera.trouble is None
            assert before.number < last + 1
    assert "secret" not in "".join(news)
    assert len(news) in (0, 2)  # it was lost and came back, or was never lost


STREAMS_WITHOUT: dict[str, tuple[Behaviour, str]] = {
    "a page": (page("Device Busy"), "is lost: (neither a video|neither a picture)"),
    "a page with an error": (page("Device Busy", 503), "is lost: .*5(03|XX)"),
    "half pictures": (
        stream(JPEG[: len(JPEG) // 3]),
        "opened again, but it sends only damaged pictures",
    ),
    "no pictures": (
        silent_stream(),
        "no picture for|no answer within|neither a video|it sends nothing",
    ),
    "silence": (silence(), "no picture for|no answer within|no data for"),
}


@pytest.mark.parametrize(("instead", "reason"), STREAMS_WITHOUT.values(), ids=STREAMS_WITHOUT)
def test_a_stream_without_pictures_is_reported_and_comes_back(instead, reason):
    news: list[str] = []
    with WebCamera(stream(JPEG)) as server:
        with open_camera(server.url, news=news.append, retry=HASTY) as camera:
            assert isinstance(camera, video.LiveVideo)
            before = taken(camera)
            server.do(instead)
            until = time.monotonic() + WAIT_S
            while not re.search(reason, current := trouble(camera)):
                assert time.monotonic() < until, current
                time.sleep(0.01)
            server.do(stream(OTHER))
            comes_back(camera, before.number)


def test_a_lenient_decoder_skips_incomplete_pictures(monkeypatch):
    monkeypatch.setattr(decoder, "MENDED_FRAMES", 5)
    with WebCamera(stream(JPEG, interval_s=0.01)) as server:
        with open_camera(server.url, retry=HASTY) as camera:
            assert isinstance(camera, video.LiveVideo)
            before = taken(camera)
            server.do(stream(JPEG[: len(JPEG) // 3], interval_s=0.01))
            until = time.monotonic() + WAIT_S
            while camera._decoder._strict or camera._decoder.damaged < 40:
                assert time.monotonic() < until
                time.sleep(0.01)
            assert "damaged" in trouble(camera)
            assert camera.take(after=camera._latest(), wait_s=0.1) is None
            server.do(stream(OTHER))
            comes_back(camera, before.number)


# ---- opening ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instead", "reason"),
    [
        *((how, why.split("|no picture")[0]) for how, why in NO_PICTURES.values() if why != BLANK),
        (silent_stream(), "no answer within"),
        (page("Not here", 404), "HTTP 404 Not Found"),
        (page("Who are you?", 401), "HTTP 401 Unauthorized"),
        (
            picture(saved(photo(), "BMP"), "application/octet-stream"),
            "neither a video nor a JPEG, PNG or WebP picture",
        ),
    ],
)
def test_a_camera_without_a_picture_at_the_start_is_refused_in_one_line(instead, reason):
    with WebCamera(instead) as server:
        address = server.url.replace("//", "//me:secret@") + "?password=secret"
        with pytest.raises(CameraError, match=reason) as error:
            open_camera(address)
    line = str(error.value)
    assert line.startswith(f"{server.url}?…: ")
    assert "secret" not in line
    assert "\n" not in line


def test_a_picture_over_the_size_limit_is_refused(monkeypatch):
    monkeypatch.setattr(http_fetch, "MAX_BYTES", 1 << 20)
    with WebCamera(picture(JPEG + bytes(1 << 20))) as server:
        with pytest.raises(CameraError, match="has more than 1 MiB"):
            open_camera(server.url)


def test_closing_does_not_wait_for_a_silent_camera(monkeypatch):
    monkeypatch.setattr(http_fetch, "SILENCE_S", 60.0)
    monkeypatch.setattr(http_fetch, "TOTAL_S", 60.0)
    with WebCamera(picture(JPEG)) as server, open_camera(server.url) as camera:
        taken(camera)
        server.do(silence())
        before = server.requests
        until = time.monotonic() + WAIT_S
        while server.requests == before:
            assert time.monotonic() < until
            time.sleep(0.005)
        camera.close()
        assert not camera._thread.is_alive()


# ---- names, passwords, redirects --------------------------------------------------------------


def digest_of(request: Request, name: str, password: str) -> str:
    """The digest of a client that knows the password (RFC 7616, MD5, qop=auth)."""
    fields = dict(re.findall(r'(\w+)="?([^",]*)"?', request.authorization))

    def md5(*parts: str) -> str:
        return hashlib.md5(":".join(parts).encode()).hexdigest()

    user_hash = md5(name, "camera", password)
    request_hash = md5("GET", fields.get("uri", ""))
    return md5(
        user_hash,
        fields.get("nonce", ""),
        fields.get("nc", ""),
        fields.get("cnonce", ""),
        "auth",
        request_hash,
    )


def guarded(shows: Behaviour, *challenges: str) -> Behaviour:
    """Serve content only to the user `me` with the password `se cret`."""

    def behave(request: Request) -> None:
        kind, _, rest = request.authorization.partition(" ")
        if (kind == "Basic" and rest == "bWU6c2UgY3JldA==" and "Basic" in challenges[0]) or (
            kind == "Digest" and digest_of(request, "me", "se cret") in rest
        ):
            shows(request)
        else:
            request.head(401, WWW_Authenticate=challenges[0], Content_Length=0)

    return behave


BASIC = 'Basic realm="camera"'
DIGEST = 'Digest realm="camera", qop="auth", nonce="0123456789", algorithm=MD5'


@pytest.mark.parametrize("challenge", [BASIC, DIGEST])
@pytest.mark.parametrize("serve", [picture, stream])
def test_name_and_password_are_sent_by_the_cameras_scheme(challenge, serve):
    with WebCamera(guarded(serve(JPEG), challenge)) as server:
        with open_camera(server.url.replace("//", "//me:se%20cret@")) as camera:
            taken(camera, taken(camera).number)
        with pytest.raises(CameraError, match="HTTP 401"):
            open_camera(server.url.replace("//", "//me:wrong@"))


@pytest.mark.parametrize("challenge", [BASIC, DIGEST])
def test_a_redirect_is_followed_without_the_password(challenge):
    authorizations: list[str] = []

    def elsewhere(request: Request) -> None:
        authorizations.append(request.authorization)
        if not request.path.startswith("/open"):
            request.head(401, WWW_Authenticate=challenge, Content_Length=0)
            return
        picture(JPEG)(request)

    with WebCamera(elsewhere) as other:

        def moved(request: Request) -> None:
            request.head(302, Location=other.url.replace("/snap", to), Content_Length=0)

        with WebCamera(guarded(moved, challenge)) as server:
            address = server.url.replace("//", "//me:se%20cret@")
            to = "/open"
            with open_camera(address) as camera:
                taken(camera)
            to = "/closed"
            with pytest.raises(CameraError, match="HTTP 401"):
                open_camera(address)
    assert set(authorizations) == {""}


@pytest.mark.parametrize("place", ["file:///etc/hostname", "ftp://127.0.0.1/x", "/again"])
def test_redirects_are_limited_in_scheme_and_number(place):
    def moved(request: Request) -> None:
        request.head(302, Location=place, Content_Length=0)

    with WebCamera(moved) as server:
        with pytest.raises(CameraError, match=r"HTTP 302|unknown|valid HTTP"):
            open_camera(server.url)


def test_a_camera_may_have_a_self_signed_certificate():
    certificate = trustme.CA().issue_cert("camera.invalid")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    with WebCamera(picture(JPEG), tls=context) as server:
        assert server.url.startswith("https://")
        with open_camera(server.url) as camera:
            assert taken(camera).picture.original_bytes == len(JPEG)
