"""JupyterHub for a class on one Linux machine with systemd; README.md beside this tells how.

The hub and the users' servers run from the hub's own environment. Its one kernel is the course's
.venv, which `python3 course.py` may bring up to date without touching the hub.
"""

import os
import sys
from pathlib import Path

COURSE = Path(os.environ.get("UNFOOL_COURSE", "/srv/unfool"))  # a checkout or a bundle, set up
TRAINED = COURSE / ("store" if (COURSE / "store").is_dir() else "data/store")

c = get_config()  # noqa: F821 (JupyterHub defines it)

c.JupyterHub.bind_url = "http://:8000"
c.Authenticator.allow_all = True  # whoever has an account on this machine and knows its password

c.JupyterHub.spawner_class = "systemd"
c.Spawner.mem_limit = "3G"  # README.md: what a user needs, measured
c.Spawner.cpu_limit = 2
c.SystemdSpawner.isolate_tmp = True

c.Spawner.cmd = [str(Path(sys.prefix) / "bin" / "jupyterhub-singleuser")]
c.Spawner.default_url = "/lab"
c.Spawner.http_timeout = c.Spawner.start_timeout = 120  # sixty start at once
c.Spawner.args = [
    # Each open notebook has a kernel, and a kernel has most of the memory.
    "--MappingKernelManager.cull_idle_timeout=3600",
    "--MappingKernelManager.cull_interval=300",
    "--MappingKernelManager.cull_connected=True",
]
c.Spawner.environment = {
    "UNFOOL_SHARED_STORE": str(TRAINED),  # only read, so that nobody trains what is there
    "UNFOOL_STORE": "~/.unfool/store",
    "UNFOOL_RECORDS": "~/.unfool/records.jsonl",
    "OMP_NUM_THREADS": "2",  # as many as cpu_limit; else every kernel takes all cores
}
