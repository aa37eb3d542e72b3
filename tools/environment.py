"""Make the virtual environment of the course: `python tools/environment.py .venv`.

It runs under whichever Python the reader has, so it uses the standard library only and its syntax
is old enough for a too old Python to reach the sentence that says so.
"""

import hashlib
import os
import shutil
import subprocess
import sys

MINIMUM = (3, 11)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def install_venv_module():
    """Debian's python3 comes without ensurepip; install it as root, else return a sentence."""
    package = "python%d.%d-venv" % sys.version_info[:2]  # noqa: UP031
    wanted = "Python's venv module is incomplete here: install it with 'apt-get install " + package
    if not shutil.which("apt-get"):
        return "Python's venv module is incomplete here: install ensurepip for " + sys.executable
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return wanted + "' as root, then run this again."
    print("Installing %s by apt-get, which Python needs to make an environment." % package)  # noqa: UP031
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    for command in (["update", "-q"], ["install", "-y", "-q", package]):
        if subprocess.call(["apt-get"] + command, env=environment, stdout=subprocess.DEVNULL):
            return wanted + "' (apt-get failed just now), then run this again."
    return None


def fingerprint():
    """What the environment is made from: it is made anew when this changes."""
    digest = hashlib.sha256()
    for name in ("requirements.txt", "pyproject.toml"):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def is_complete(folder):
    """True where an earlier run has installed exactly these requirements."""
    try:
        with open(os.path.join(folder, ".complete")) as file:
            return file.read() == fingerprint()
    except OSError:
        return False


def make(folder):
    """Create `folder`, install requirements.txt and nflib into it; return an error or None."""
    if is_complete(folder):
        return None
    if sys.version_info[:2] < MINIMUM:
        return (
            "The course needs Python 3.11 or later, and this is %s at %s: "  # noqa: UP031
            "choose another with 'make PYTHON=python3.12 ...'."
            % (".".join(map(str, sys.version_info[:3])), sys.executable)
        )
    stamp = os.path.join(folder, ".complete")
    if os.path.exists(stamp):
        os.remove(stamp)
    python = os.path.join(folder, "bin", "python")
    # A folder without pip is what an interrupted run leaves behind: it is made again.
    usable = os.path.exists(python) and not subprocess.call(
        [python, "-m", "pip", "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    if not usable:
        try:
            import ensurepip  # noqa: F401
        except ImportError:
            problem = install_venv_module()
            if problem:
                return problem
        print("Making the environment %s with %s." % (folder, sys.executable))  # noqa: UP031
        if subprocess.call([sys.executable, "-m", "venv", "--clear", folder]):
            return "The environment %s could not be made: the lines above say why." % folder  # noqa: UP031
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    print("Installing the exact versions of requirements.txt (torch is large: minutes, once).")
    sys.stdout.flush()
    requirements = os.path.join(ROOT, "requirements.txt")
    if subprocess.call(pip + ["--requirement", requirements]):
        return "requirements.txt could not be installed: the lines above say why."
    if subprocess.call(pip + ["--no-deps", "--editable", ROOT]):
        return "nflib could not be installed: the lines above say why."
    with open(stamp, "w") as file:
        file.write(fingerprint())
    return None


if __name__ == "__main__":
    sys.exit(make(os.path.abspath(sys.argv[1])))
