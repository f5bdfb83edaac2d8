"""The recipe in solutions/hub: a real hub, one learner, a link that brings the notebooks."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import nbformat
import pytest
import requests
import websocket
from nbformat.v4 import new_code_cell, new_notebook

from browser import until
from unfool.doctor import locked_versions
from unfool.lab import Lab
from unfool.notebooks import REPO

RECIPE = REPO / "solutions" / "hub"
PROXY = re.search(r"configurable-http-proxy@([\d.]+)", (RECIPE / "README.md").read_text("utf-8"))
BRANCH = "main"
CELLS = (
    "import sys\nprint(sys.prefix)",
    "from unfool.lab import Lab\nprint(type(Lab('smoke').classifier('anet')).__name__)",
    "from unfool.artifacts import Store\nprint(*sorted(p.name for p in Store().root.glob('*')))",
)
# The recipe as it stands, but for what needs accounts, systemd and fixed ports.
OVERRIDES = """
load_subconfig({recipe!r})
c.JupyterHub.authenticator_class = "dummy"
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = {homes!r} + "/{{username}}"
c.Spawner.args.append("--allow-root")
c.JupyterHub.bind_url = "http://127.0.0.1:{ports[0]}"
c.JupyterHub.hub_port = {ports[1]}
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{ports[2]}"
c.ConfigurableHTTPProxy.command = [{proxy!r}]
c.JupyterHub.cleanup_servers = True
"""


# ------------------------------------------------------------------------------------ the recipe


def test_the_hub_has_the_courses_versions() -> None:
    """What both environments hold is the same in both, or a notebook might save differently."""
    hub = locked_versions((RECIPE / "requirements.txt").read_text("utf-8"))
    course = locked_versions((REPO / "requirements.lock").read_text("utf-8"))
    asked = locked_versions((RECIPE / "requirements.in").read_text("utf-8"))
    assert {name: hub[name] for name in asked} == asked
    both = hub.keys() & course.keys()
    assert {name: hub[name] for name in both} == {name: course[name] for name in both}
    assert len(both) > 50
    assert hub.keys() - course.keys() >= {"jupyterhub", "nbgitpuller", "jupyterhub-systemdspawner"}


def test_the_link_to_hand_out() -> None:
    link = re.search(r"^http\S+/git-pull\?\S+$", (RECIPE / "README.md").read_text("utf-8"), re.M)
    assert link is not None
    query = dict(parse_qsl(urlsplit(link.group()).query))
    assert query["repo"].startswith("file:///")
    name = query["urlpath"].removeprefix(f"lab/tree/{query['targetpath']}/")
    assert (REPO / name).is_file()
    assert query["branch"] == BRANCH


# ---------------------------------------------------------------------------------- a real hub


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )


def hub_python(folder: Path) -> Path:
    """Make the hub's own environment, as README.md says; skips where the index can't be had."""
    uv = (sys.executable, "-m", "uv")
    run(*uv, "venv", "--python", sys.executable, folder)
    python = folder / "bin" / "python"
    wanted = RECIPE / "requirements.txt"
    done = run(*uv, "pip", "sync", "--python", python, "--require-hashes", wanted)
    if done.returncode:
        pytest.skip(f"the hub's packages can't be installed: {done.stderr[-300:]}")
    spec = Path(sys.prefix) / "share" / "jupyter" / "kernels" / "python3"
    install = (sys.executable, "-m", "jupyter", "kernelspec", "install", spec)
    done = run(*install, "--name", "python3", "--prefix", folder, "--replace")
    assert done.returncode == 0, done.stderr
    return python


def proxy(folder: Path) -> Path:
    """Install Node's configurable-http-proxy in the version that README.md names."""
    if shutil.which("npm") is None:
        pytest.skip("no npm, which fetches the hub's proxy")
    assert PROXY is not None
    done = run("npm", "install", "--silent", "--prefix", folder, PROXY.group())
    if done.returncode:
        pytest.skip("npm can't fetch configurable-http-proxy")
    return folder / "node_modules" / ".bin" / "configurable-http-proxy"


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


@contextmanager
def hub(python: Path, course: Path, program: Path, folder: Path) -> Iterator[str]:
    """The recipe at work; yields its address."""
    ports = free_ports(3)
    text = OVERRIDES.format(
        recipe=str(RECIPE / "jupyterhub_config.py"),
        homes=str(folder / "home"),
        ports=ports,
        proxy=str(program),
    )
    config = folder / "config.py"
    config.write_text(text, encoding="utf-8")
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPATH") if name in os.environ}
    env = {**kept, "HOME": str(folder), "UNFOOL_COURSE": str(course)}
    with (folder / "hub.log").open("wb") as log:
        server = subprocess.Popen(
            [python, "-m", "jupyterhub", "-f", config], env=env, cwd=folder, stdout=log, stderr=log
        )
    address = f"http://127.0.0.1:{ports[0]}"
    try:
        until(lambda: answers(f"{address}/hub/health"), 60)
        yield address
    finally:
        server.terminate()  # ends the users' servers and the proxy, too
        server.wait(30)


def answers(address: str) -> bool:
    try:
        return requests.get(address, timeout=5).ok
    except requests.RequestException:
        return False


def log_in(address: str, name: str, goal: str) -> requests.Session:
    """Log in as a browser does, and follow the link `goal` up to the user's own server."""
    session = requests.Session()
    page = session.get(f"{address}{goal}", timeout=30)  # to the login page
    assert "/hub/login" in page.url
    form = {"username": name, "password": "any", "_xsrf": session.cookies["_xsrf"]}
    page = session.post(page.url, data=form, timeout=30)

    def arrived() -> bool:
        return f"/user/{name}/git-pull" in session.get(f"{address}{goal}", timeout=60).url

    assert page.ok, page.text[-500:]
    until(arrived, 120)
    return session


def pulled(session: requests.Session, server: str, **wanted: str) -> list[str]:
    """Do what nbgitpuller's page does; returns the phases that it went through."""
    page = session.get(f"{server}/git-pull/api", params=wanted, timeout=120)
    assert page.ok, page.text[-500:]
    events = [json.loads(line[6:]) for line in page.text.splitlines() if line.startswith("data: ")]
    assert events[-1]["phase"] == "finished", events
    return [event["phase"] for event in events]


def executed(session: requests.Session, server: str, path: str) -> list[str]:
    """Open a notebook and run its cells on a kernel; returns what each printed."""
    mine = {c.name: c.value or "" for c in session.cookies if c.path.startswith("/user/")}
    xsrf = {"X-XSRFToken": mine["_xsrf"]}
    nb = session.get(f"{server}/api/contents/{path}", timeout=30).json()["content"]
    wanted = {"name": "python3", "path": path}
    kernel = session.post(f"{server}/api/kernels", json=wanted, headers=xsrf, timeout=60).json()
    kernel = f"{server}/api/kernels/{kernel['id']}"
    channel = websocket.create_connection(
        f"{kernel.replace('http', 'ws', 1)}/channels",
        cookie="; ".join(f"{name}={value}" for name, value in mine.items()),
        timeout=300,
    )
    code = [cell["source"] for cell in nb["cells"] if cell["cell_type"] == "code"]
    printed = [answer(channel, source) for source in code]
    channel.close()
    session.delete(kernel, headers=xsrf, timeout=30)
    return printed


def answer(channel: websocket.WebSocket, source: str) -> str:
    """Execute one cell and return what it prints; an error fails the test."""
    header = {"msg_id": uuid.uuid4().hex, "msg_type": "execute_request", "version": "5.4"}
    header |= {"username": "", "session": uuid.uuid4().hex, "date": "2026-01-01T00:00:00Z"}
    request = {"header": header, "parent_header": {}, "metadata": {}, "channel": "shell"}
    channel.send(json.dumps({**request, "content": {"code": source, "silent": False}}))
    printed = ""
    while True:
        message = json.loads(channel.recv())
        if message["parent_header"].get("msg_id") != header["msg_id"]:
            continue
        content = message["content"]
        assert message["msg_type"] != "error", content
        printed += content["text"] if message["msg_type"] == "stream" else ""
        if message["msg_type"] == "status" and content["execution_state"] == "idle":
            return printed


def class_repository(folder: Path) -> Path:
    """A bare clone with one notebook: what the link pulls from."""
    notebook = new_notebook(cells=[new_code_cell(source) for source in CELLS])
    (folder / "class").mkdir()
    run("git", "init", "-q", "-b", BRANCH, cwd=folder / "class")
    publish(folder, "small.ipynb", nbformat.writes(notebook))
    return folder / "class.git"


def publish(folder: Path, name: str, text: str) -> None:
    work = folder / "class"
    (work / name).write_text(text, encoding="utf-8")
    author = ("-c", "user.name=Teacher", "-c", "user.email=teacher@example.invalid")
    run("git", "add", ".", cwd=work)
    assert run("git", *author, "commit", "-q", "-m", name, cwd=work).returncode == 0
    if not (folder / "class.git").exists():
        run("git", "clone", "-q", "--bare", work, folder / "class.git")
    assert run("git", "push", "-q", folder / "class.git", BRANCH, cwd=work).returncode == 0


def prepared_course(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course that is set up, with one trained network that all share."""
    (folder / "data").mkdir(parents=True)
    monkeypatch.setenv("UNFOOL_STORE", str(folder / "data" / "store"))
    Lab("smoke").classifier("anet")
    files = [path for path in (folder / "data").rglob("*") if path.is_file()]
    assert all(path.stat().st_mode & 0o004 for path in files)  # learners are other users
    return folder


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="JupyterHub does not run on Windows")
def test_a_learner_follows_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python, program = hub_python(tmp_path / "venv"), proxy(tmp_path / "proxy")
    course = prepared_course(tmp_path / "course", monkeypatch)
    source = class_repository(tmp_path)
    wanted = {"repo": f"file://{source}", "branch": BRANCH, "targetpath": "unfool"}
    link = f"/hub/user-redirect/git-pull?{urlencode({**wanted, 'urlpath': 'lab'})}"
    with hub(python, course, program, tmp_path) as address:
        session, server = log_in(address, "ada", link), f"{address}/user/ada"
        pulled(session, server, **wanted)
        assert "nbgrader" not in session.get(f"{server}/lab", timeout=30).text  # teachers' menus
        home = tmp_path / "home" / "ada"
        assert executed(session, server, "unfool/small.ipynb") == [
            f"{sys.prefix}\n",  # the course's environment, not the hub's
            "Sequential\n",
            "\n",  # nothing had to be trained
        ]

        mine = home / "unfool" / "small.ipynb"
        handed = mine.read_text("utf-8")
        mine.write_text(handed.replace("import sys", "import sys  # mine"), encoding="utf-8")
        publish(
            tmp_path, "small.ipynb", handed.replace("import sys", "import sys  # the teacher's")
        )
        publish(tmp_path, "next.ipynb", handed)
        pulled(session, server, **wanted)
        assert (home / "unfool" / "next.ipynb").read_text("utf-8") == handed
        assert "# mine" in mine.read_text("utf-8")
        assert "teacher" not in mine.read_text("utf-8")
    assert not answers(f"{address}/hub/health")
