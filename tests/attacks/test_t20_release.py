"""T20: what is installed beside us is what was tested: the very files, known by their hashes.

Seen failing: with a package of requirements.lock taken out, with `==` made `>=` there, with
another version than the one that is installed, with the hashes of a package taken out, without
setuptools, with a package more that builds ours; with `--require-hashes` or `--no-build-isolation`
taken out of the Makefile, and with a package more in its `pip install torch`. That pip refuses a
file was seen failing with the right hash in the place of the wrong one. Who put a file on the
index is not checked: see the threat model.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
EXTRAS = ("demo", "dev")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# What CUDA builds of torch need besides, which no lock for all machines can hold.
BEYOND = {canonicalize_name(name) for name in PYPROJECT["tool"]["uv"]["exclude-dependencies"]}
ENTRY = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.+!]+)(?: ; (?P<marker>[^\\]+?))?"
    r"(?: --hash=sha256:[0-9a-f]{64})+"
)


def locked() -> dict[str, str]:
    """The version of each package for this machine; each must have one exactly, and hashes."""
    text = (ROOT / "requirements.lock").read_text()
    found = dict[str, str]()
    for line in re.sub(r" \\\n +", " ", text).splitlines():
        if line.startswith("#"):
            continue
        match = ENTRY.fullmatch(line)
        assert match, f"no exact version of a package with hashes: {line!r}"
        if match["marker"] and not Marker(match["marker"]).evaluate():
            continue
        name = canonicalize_name(match["name"])
        assert name not in found, f"{name} stands there twice"
        found[name] = match["version"]
    return found


def installs() -> list[str]:
    """Each `pip install` that make runs where there is no environment yet, in their order."""
    command = ["make", "--dry-run", "--always-make", ".venv/.installed"]
    bare = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    made = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, check=True)
    lines = made.stdout.replace("\\\n", " ").splitlines()
    return [line for line in lines if "/pip install " in line]


def closure(name: str, extras: tuple[str, ...]) -> dict[str, str]:
    """The installed version of everything that the package needs here, itself left out."""
    versions = dict[str, str]()
    done = set[tuple[str, str]]()
    work = [(name, extra) for extra in ("", *extras)]
    while work:
        one = work.pop()
        if one in done:
            continue
        done.add(one)
        package, extra = one
        found = distribution(package)
        versions[canonicalize_name(package)] = found.version
        for text in found.requires or ():
            needed = Requirement(text)
            if canonicalize_name(needed.name) in BEYOND:
                continue
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                work += [(needed.name, more) for more in ("", *needed.extras)]
    del versions[canonicalize_name(name)]
    return versions


def test_every_package_that_we_need_is_locked_to_what_is_installed() -> None:
    pins = locked()
    needed = closure("glasshive", EXTRAS)
    assert len(needed) > 60
    unpinned = needed.keys() - pins.keys()
    assert not unpinned, f"not in requirements.lock: {sorted(unpinned)}"
    # A build of torch says more after the +; the lock has the hashes of several.
    other = {
        name: (version, pins[name])
        for name, version in needed.items()
        if version.partition("+")[0] != pins[name]
    }
    assert not other, f"installed, and locked: {other}"


def test_nothing_is_locked_that_nobody_needs() -> None:
    """A line that is left over says that something is used which is not."""
    assert not locked().keys() - closure("glasshive", EXTRAS).keys()


def test_what_builds_the_wheel_is_locked() -> None:
    pins = locked()
    for text in PYPROJECT["build-system"]["requires"]:
        needed = Requirement(text)
        name = canonicalize_name(needed.name)
        assert name in pins, f"{name} builds the wheel, and is not in requirements.lock"
        assert needed.specifier.contains(pins[name])
        assert version(name) == pins[name]


def test_the_makefile_installs_by_hash_only() -> None:
    """All by the lock; then what CUDA builds of torch need besides; then our own source."""
    *checked, torch, own = installs()
    assert checked[-1].endswith(" -r requirements.lock")
    for one in checked:
        assert "--require-hashes" in one, one
    for one in (*checked, own):
        assert "--no-deps" in one, one
        assert "--no-build-isolation" in one, one  # an isolated build fetches what the lock lacks
    assert own.endswith(" .")
    assert "--only-binary :all:" in torch  # builds nothing, so it fetches nothing for that
    assert torch.endswith(" :all: torch")


@pytest.mark.parametrize(
    ("hashed", "refusal"),
    [
        (b"the file", None),
        (b"another file", "DO NOT MATCH THE HASHES"),
        (None, "Hashes are required in --require-hashes mode"),
    ],
)
def test_a_file_with_another_hash_is_refused(
    tmp_path: Path, hashed: bytes | None, refusal: str | None
) -> None:
    """By pip itself, with the options that the Makefile gives it."""
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "")
        info = "tiny-1.0.dist-info/"
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        archive.writestr(info + "RECORD", "")
    content = wheel.read_bytes() if hashed == b"the file" else hashed
    lock = tmp_path / "tiny.lock"
    digest = "" if content is None else f" --hash=sha256:{hashlib.sha256(content).hexdigest()}"
    lock.write_text(f"tiny==1.0{digest}\n")
    target = tmp_path / "target"

    pip, install, *options = shlex.split(installs()[0])
    assert (Path(pip).name, install) == ("pip", "install")
    options = options[: options.index("-r")]
    offline = ["--no-index", "--find-links", str(tmp_path), "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", *options, *offline, "-r", str(lock)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (target / "tiny.py").exists() == (refusal is None), done.stderr
    assert (done.returncode == 0) == (refusal is None)
    assert (refusal or "") in done.stderr


def test_continuous_integration_runs_what_is_pinned() -> None:
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("\nmake test")
