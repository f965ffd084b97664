"""One `Answerer` per camera, each with its own rules of the policy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Unpack

from edge_client.client import ClientOptions
from edge_client.gateway.answerer import Answerer
from edge_client.gateway.config import GatewayConfig
from edge_client.picture import PictureCache
from edge_client.privacy.policy import PrivacyPolicy, load_policy
from vlm_collab.openai import refuse


class Cameras:
    """The answerers of the policy's cameras, each made at its first use.

    They share the memory for originals and the threads that decode pictures. Counters of the policy
    are kept per camera.

    Args:
        config: see `GatewayConfig`.
        url: address of the service.
        options: see `ClientOptions`; `camera` is the default camera.

    Raises:
        ConfigError: a setting is invalid.

    Attributes:
        default: answers requests that name no camera.
    """

    def __init__(self, config: GatewayConfig, url: str, **options: Unpack[ClientOptions]) -> None:
        policy = options.get("policy")
        if policy is not None and not isinstance(policy, PrivacyPolicy):
            policy = options["policy"] = load_policy(policy)
        self._names = frozenset() if policy is None else frozenset(policy.cameras)
        self._config = config
        self._url = url
        self._options = options
        limits = config.limits
        pixels = options.get("max_pixels", limits.max_pixels)
        self._pictures = PictureCache(pixels, limits.max_picture_bytes)
        # A pool of threads sets the limit, not a semaphore: a decoding thread cannot be stopped, so
        # it must count until its picture is done, even if the question was cancelled.
        self._decoder = ThreadPoolExecutor(limits.max_decoding, "pictures")
        options.setdefault("decoder", self._decoder)
        self.default = Answerer(config, url, self._pictures, **options)
        self._answerers = {self.default.camera: self.default}

    def get(self, name: str | None) -> Answerer:
        """The answerer of a camera; the default one for no name.

        Raises:
            ApiError: the policy does not name it (404).
        """
        if name is None:
            return self.default
        if name not in self._names:
            hint = "" if self._names else "; name cameras in the file of --policy"
            text = f"there is no camera {name!r}{hint}"
            raise refuse(None, text, "camera_not_found", status=404)
        if name not in self._answerers:
            options: ClientOptions = {**self._options, "camera": name}
            self._answerers[name] = Answerer(self._config, self._url, self._pictures, **options)
        return self._answerers[name]

    async def close(self) -> None:
        """Close all connections. Unanswered questions end with an error."""
        for answerer in self._answerers.values():
            await answerer.close()
        self._decoder.shutdown(wait=False)
