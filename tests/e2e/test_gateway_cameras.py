"""Several cameras behind one gateway, each with its own rules of the policy."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from edge_client.privacy.audit_log import ViewLine, read_log
from tests.e2e.common import SURE, UNSURE, photo, slow
from tests.e2e.gateways import MODEL, Deployment, deployed, item, user_message
from vlm_collab.geometry import Box

POLICY = f"""
cameras:
  default: {{}}
  door:
    hide:
      - fractions: [0, 0, 0.5, 1]
  front yard:
    max_region_share: 0.000001
  budget:
    max_bytes_per_hour: {10_000}
  night:
    quiet_hours: ["00:00-12:00", "12:00-24:00"]
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return path


def at(deployment: Deployment, camera: str) -> openai.AsyncOpenAI:
    """The SDK with the base URL of a camera."""
    root = deployment.base.removesuffix("/v1")
    return deployment.client.with_options(base_url=f"{root}/cameras/{camera}/v1")


async def ask(client: openai.AsyncOpenAI, question: str = SURE, number: int = 1) -> Any:
    return await client.chat.completions.create(
        model=MODEL, messages=[user_message(question, photo(number))]
    )


async def test_each_camera_has_its_own_rules(policy: Path, tmp_path: Path):
    audit = tmp_path / "audit.jsonl"
    async with deployed(policy=policy, audit=audit) as deployment:
        assert (await ask(deployment.client, UNSURE)).vlm_collab["refined"]
        assert (await ask(at(deployment, "door"))).choices
        reply = await ask(at(deployment, "front%20yard"), UNSURE)
        assert reply.vlm_collab["declined"] == "limit"
        for content in ([user_message(SURE, photo(1))], [{"role": "user", "content": "hello"}]):
            with pytest.raises(openai.PermissionDeniedError, match='"night"'):
                await at(deployment, "night").chat.completions.create(model=MODEL, messages=content)
        assert [model.id async for model in at(deployment, "door").models.list()] == [MODEL]
    log = read_log(audit)
    views = [line for line in log.images if isinstance(line, ViewLine)]
    assert [line.camera for line in views] == ["default", "door", "front yard"]
    assert [log.black_in(line) for line in views] == [(), (Box(0, 0, 240, 360),), ()]


async def test_a_camera_that_the_policy_does_not_name_is_not_found(policy: Path):
    async with deployed(policy=policy) as deployment:
        for camera in ("attic", "door%2Fdoor", "Door"):
            with pytest.raises(openai.NotFoundError) as caught:
                await ask(at(deployment, camera))
            assert caught.value.type == "invalid_request_error"
        with pytest.raises(openai.NotFoundError, match="no camera 'attic'") as caught:
            await ask(at(deployment, "attic"))
        assert caught.value.code == "camera_not_found"
        assert not deployment.proxy.connections
    async with deployed() as deployment:
        with pytest.raises(openai.NotFoundError, match="--policy"):
            await ask(at(deployment, "default"))


async def test_conversations_stay_with_their_camera(policy: Path):
    async with deployed(policy=policy) as deployment:
        door, yard = at(deployment, "door"), at(deployment, "front%20yard")
        first = await door.responses.create(model=MODEL, input=[item(SURE, photo(1))])
        for other in (yard, deployment.client):
            with pytest.raises(openai.BadRequestError) as caught:
                await other.responses.create(model=MODEL, input="?", previous_response_id=first.id)
            assert caught.value.code == "previous_response_not_found"
            with pytest.raises(openai.NotFoundError):
                await other.responses.delete(first.id)
            reference: Any = {"type": "item_reference", "id": first.output[0].id}
            with pytest.raises(openai.NotFoundError) as missing:
                await other.responses.create(model=MODEL, input=[reference, item(SURE, photo(1))])
            assert missing.value.code == "item_not_found"
        await door.responses.create(model=MODEL, input="?", previous_response_id=first.id)
        await door.responses.delete(first.id)


async def test_both_urls_of_a_camera_share_its_byte_limit(policy: Path):
    async with deployed(policy=policy, camera="budget") as deployment:
        assert (await ask(deployment.client, number=1)).vlm_collab["view_bytes"] > 5000
        with pytest.raises(openai.PermissionDeniedError, match="10000 bytes an hour"):
            await ask(at(deployment, "budget"), number=2)
        assert (await ask(at(deployment, "default"), number=2)).choices


async def test_cameras_share_the_limits(policy: Path):
    async with deployed(
        slow(0.5), policy=policy, limits={"max_requests": 1, "max_waiting": 0}
    ) as deployment:
        running_question = asyncio.create_task(ask(at(deployment, "door")))
        while not deployment.proxy.connections:
            await asyncio.sleep(0.005)
        with pytest.raises(openai.RateLimitError):
            await ask(at(deployment, "front%20yard"))
        await running_question


async def test_requests_to_a_camera_need_the_api_key(policy: Path):
    async with deployed(policy=policy, api_key="right") as deployment:
        with pytest.raises(openai.AuthenticationError):
            await ask(at(deployment, "door"))
        with pytest.raises(openai.AuthenticationError):
            await ask(at(deployment, "attic"))  # without the key, nobody learns which cameras exist
        assert (await ask(at(deployment, "door").with_options(api_key="right"))).choices
