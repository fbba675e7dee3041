"""A service whose pictures are made by two replicas on Ray Serve: python examples/ray_serve.py BUNDLE [PORT]."""

import sys
from pathlib import Path

from qdeploy.serve.cluster.settings import ReplicaSettings
from qdeploy.serve.room import RoomSettings
from qdeploy.serve.service import ServiceSettings, choose_hosts, run_service
from qdeploy.serve.web.settings import WebSettings

HOST = "127.0.0.1"

if __name__ == "__main__":  # Ray imports this file in its processes
    replicas = ReplicaSettings(least=2, most=2)  # address="auto" for a cluster that runs already
    settings = ServiceSettings(
        threads=1,
        room=RoomSettings(queue=64, runners=replicas.senders),
        web=WebSettings(hosts=choose_hosts(HOST, ())),
        replicas=replicas,
    )
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 8000
    run_service({"bundle": Path(sys.argv[1])}, settings, HOST, port, lambda url: print(f"serving at {url}", flush=True))
