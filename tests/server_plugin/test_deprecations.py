"""No deprecated name of transformers is used, in its old and new versions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server_plugin.backends.transformers.batch import cache_argument
from tests.support.tiny_instructblip import save_tiny_instructblip
from tests.support.tiny_llava import save_tiny_llava
from tests.support.tiny_qwen import save_tiny_qwen
from vlm_collab.errors import ModelError

# Both passes and a map, as when a server warms up; no warning is suppressed.
ANSWER = """
import asyncio, sys
from server_plugin.backends.open import open_model
backend, _ = open_model(sys.argv[1], device="cpu", layer=1)
asyncio.run(backend.warm_up())
"""


@pytest.mark.parametrize(
    "save",
    [
        save_tiny_llava,
        # Their result changes only with installed versions; `make parity` runs them too.
        pytest.param(save_tiny_instructblip, marks=pytest.mark.slow),
        pytest.param(save_tiny_qwen, marks=pytest.mark.slow),
    ],
)
def test_no_library_warns_while_a_model_answers(
    save: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = save(tmp_path / "tiny")
    # Show deprecation warnings, which Python hides by default. Some of them are about one library
    # in another.
    shown = ["-W", "always::DeprecationWarning:server_plugin", "-W", "always::FutureWarning"]
    left_out = ("TRANSFORMERS_VERBOSITY", "PYTHONWARNINGS")
    done = subprocess.run(
        [sys.executable, *shown, "-c", ANSWER, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={name: value for name, value in os.environ.items() if name not in left_out},
    )
    assert (done.returncode, done.stderr) == (0, "")


class _Before:
    def forward(self, inputs_embeds: Any, past_key_values: Any = None, **rest: Any) -> None: ...


class _Since:
    def forward(self, inputs_embeds: Any, cache: Any = None, **rest: Any) -> None: ...


class _Neither:
    def forward(self, inputs_embeds: Any, **rest: Any) -> None: ...


def test_the_cache_is_passed_under_the_decoder_s_own_argument_name() -> None:
    assert cache_argument(_Before) == "past_key_values"  # up to 5.23
    assert cache_argument(_Since) == "cache"
    with pytest.raises(ModelError, match=r"_Neither of transformers \d.* takes no cache"):
        cache_argument(_Neither)  # without a cache its answers would be silently wrong
