"""Where a host computes: the device that was asked for, if torch has it here."""

from __future__ import annotations

import torch

from glasshive.peer.errors import NoSuchDevice


def find_device(wanted: torch.device | str) -> torch.device:
    """The device of that name; for "auto" the first there is of cuda, mps, cpu.

    Raises NoSuchDevice if torch has no such device on this machine.
    """
    if wanted == "auto":
        kinds = [kind for kind in ("cuda", "mps") if _count(kind)]
        return torch.device(kinds[0] if kinds else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise NoSuchDevice(
            f"got the device {str(wanted)[:40]!r}, wanted cpu, cuda or mps; {_what_there_is()}"
        ) from None
    if device.type != "cpu" and (device.index or 0) >= _count(device.type):
        raise NoSuchDevice(
            f"got the device {str(device)!r}, but {_what_there_is()}; choose one of those, or "
            f"install a torch and a driver for {device.type} (https://pytorch.org/get-started)"
        )
    return device


def wait_for(device: torch.device) -> None:
    """Return when `device` has done all that it was given: it computes behind the caller's back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _count(kind: str) -> int:
    """How many devices of that kind torch has here that models can run on."""
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    return int(kind == "mps" and torch.backends.mps.is_available())


def _what_there_is() -> str:
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    cuda, mps = _count("cuda"), _count("mps")
    found = ["cpu", *([f"cuda ({cuda})"] if cuda else []), *(["mps"] if mps else [])]
    return f"torch {torch.__version__}, {built}, has {', '.join(found)} here"
