"""The page's files, their headers, and its message layer under node."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import page_cases
from tests.support.patience import PATIENCE_S
from tests.support.transcripts import stored
from vlm_collab.page import HEADERS, INDEX, page_file, page_paths, token_in

ROOT = Path(__file__).resolve().parents[2]
MODULES = ROOT / "vlm_collab/page/static/page"
REPLAY = ROOT / "tests/support/replay.mjs"


def text(path: str) -> str:
    file = page_file(path)
    assert file is not None, path
    return file.content.decode()


def test_the_page_has_exactly_the_files_that_it_names():
    named = set(re.findall(r'(?:src|href)="([^"]+)"', text(INDEX)))
    for path in page_paths():
        if path.endswith("js"):
            folder = path.rpartition("/")[0]
            for target in re.findall(r'from "([^"]+)"', text(path)):
                assert target.startswith(("./", "../")), (path, target)
                full = (Path("/") / folder / target).resolve().relative_to("/")
                named.add(full.as_posix())
    assert named <= set(page_paths())
    assert set(page_paths()) == named | {INDEX}, "a file that nothing uses"


def test_only_files_of_the_page_are_found():
    outside = ("", "page", "page/", "../__init__.py", "page/../../__init__.py", "/etc/passwd")
    inside = ("page/vendor/README.md", "page/vendor/msgpack/LICENSE", "package.json")
    for path in (*outside, *inside):
        assert page_file(path) is None


def test_files_have_media_types_and_etags():
    for path in page_paths():
        file = page_file(path)
        assert file is not None
        if path.endswith("js"):
            assert file.media_type.startswith("text/javascript")
        assert re.fullmatch(r'"[0-9a-f]{16}"', file.etag)
    assert len({page_file(path) for path in page_paths()}) == len(page_paths())


def test_the_page_names_no_other_host():
    for path in page_paths():
        if "/vendor/" not in path:
            assert set(re.findall(r"https?://[^\s\"'`)]+", text(path))) <= {
                "http://www.w3.org/2000/svg"  # a name, not an address
            }, path


def test_the_content_policy_allows_only_own_files_and_no_inline_code():
    policy = dict(
        part.strip().split(" ", 1) for part in HEADERS["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    html = text(INDEX)
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", html)


def test_the_vendored_library_comes_with_its_licence_and_version():
    vendor = MODULES / "vendor"
    assert "ISC" in (vendor / "README.md").read_text()
    assert re.search(r"msgpack\S* 3\.\d+\.\d+", (vendor / "README.md").read_text())
    assert "MessagePack Community" in (vendor / "msgpack/LICENSE").read_text()


def test_the_token_is_found_among_the_subprotocols():
    assert token_in(["vlm-collab.v1"]) is None
    assert token_in(["vlm-collab.v1", "vlm-collab.token.czNjcmV0"]) == "s3cret"
    assert token_in(["vlm-collab.token.Z3LDvG4"]) == "grün"
    for broken in ("", "A", "****", "_w", "czNj cmV0"):
        assert token_in([f"vlm-collab.token.{broken}"]) == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(scheme: str):
    css = text("page/page.css")
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[0]))
    if scheme == "dark":
        colours |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[1]))
    for ink in ("text", "soft", "accent", "good", "warn", "bad"):
        for ground in ("page", "card"):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2.2."""

    def luminance(colour: str) -> float:
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# ---- the message layer -----------------------------------------------------------------------


def test_the_python_edge_still_replays_the_recorded_transcripts():
    assert len(stored()) >= 16
    page_cases.check_own()


@pytest.mark.skipif(shutil.which("node") is None, reason="no node; Chromium runs the same cases")
def test_the_page_s_messages_and_geometry_equal_python_s_under_node():
    sent = page_cases.cases()
    program = f"""
        const {{ replay }} = await import("file://{REPLAY}");
        let text = "";
        for await (const piece of process.stdin) text += piece;
        process.stdout.write(JSON.stringify(await replay(JSON.parse(text))));
    """
    done = subprocess.run(
        ["node", "--input-type=module", "-e", program],
        input=json.dumps({"base": f"file://{MODULES}/", **sent}),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    page_cases.check(sent, json.loads(done.stdout))
