"""Device and floating point type of a model, checked before weights are loaded."""

from __future__ import annotations

import torch

from vlm_collab.errors import ConfigError

_KINDS = ("cpu", "cuda", "mps", "xpu")


def device_of(name: str) -> torch.device:
    """Return the device with a name.

    Args:
        name: as torch writes it (`cpu`, `cuda:1`); `auto` is CUDA if available, else the CPU.

    Raises:
        ConfigError: there is no such device, or torch cannot compute on it here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accelerator = torch.accelerator.current_accelerator()
    own = () if accelerator is None else (accelerator.type,)
    known = dict.fromkeys(("auto", *_KINDS, *own))
    try:
        # torch warns about some old device names, and cannot compute on others.
        device = torch.device(name) if name.partition(":")[0] in known else None
    except RuntimeError:
        device = None
    if device is None:
        raise ConfigError(f"there is no device {name!r}; there are: {', '.join(known)}")
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on the device
        raise ConfigError(
            f"torch cannot use the device {name!r} here; it can use: {', '.join(('cpu', *own))}"
        ) from error
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return the floating point type with a name; `auto` is bfloat16 on CUDA, else float32.

    Raises:
        ConfigError: the name is not one of a floating point type.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, name, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(
            f"{name!r} is not a floating point type; choose float32, bfloat16 or float16"
        )
    return dtype
