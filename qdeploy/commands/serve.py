"""`qdeploy serve`."""

from __future__ import annotations

import click

from qdeploy.commands import GUIDANCE, MILLION, STEPS, THREADS, Number, Whole, is_typed

DAY_S = 86_400
RELOAD_S = 2.0  # between looks at the bundles' folders


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="[NAME=]BUNDLE...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 for everybody.")
@click.option("--port", type=Whole(0, 65_535), default=8000, show_default=True, help="0 for any that is free.")
@click.option(
    "--api-key", envvar="QDEPLOY_API_KEY", metavar="KEY",
    help="What clients must send. Better given as QDEPLOY_API_KEY, which other users of the machine cannot read.",
)  # fmt: skip
@click.option("--cors", "origins", multiple=True, metavar="ORIGIN", help="Site whose pages may call the service.")
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="Name by which clients may call it.")
@click.option("--engine", help="Default: the one each bundle was exported for.")
@click.option("--threads", type=THREADS, help="Of one call. Default: all cores; on Ray 1.")
@click.option(
    "--runners",
    type=Whole(1, 1000),
    default=1,
    show_default=True,
    help="Pictures of a bundle, or of its replica, made at once.",
)
@click.option(
    "--batch", type=Whole(1, 1000), default=1, show_default=True,
    help="Pictures in one UNet call, of bundles exported with --dynamic batch; pays on GPUs.",
)  # fmt: skip
@click.option("--queue", type=Whole(1, MILLION), default=32, show_default=True, help="Pictures that may wait.")
@click.option(
    "--timeout", "timeout_s", type=Number(0, DAY_S, min_open=True), default=300.0, show_default=True,
    help="Seconds that a request may take, waiting included.",
)  # fmt: skip
@click.option(
    "--stop-timeout", "finish_s", type=Number(0, DAY_S), default=30.0, show_default=True,
    help="Seconds to finish what is asked for when the service is stopped; the rest is refused.",
)  # fmt: skip
@click.option(
    "--memory-gb", type=Number(0, MILLION, min_open=True),
    help="Of all bundles together, by the size of their graphs. Default: all stay in memory.",
)  # fmt: skip
@click.option("--steps", type=STEPS, default=25, show_default=True, help="Of a request that names none.")
@click.option("--guidance", type=GUIDANCE, default=7.5, show_default=True, help="The same.")
@click.option("--max-steps", type=STEPS, default=150, show_default=True, help="The most that a request may ask for.")
@click.option("--max-pictures", type=Whole(1, 10_000), default=10, show_default=True, help="The same.")
@click.option("--max-pixels", type=Whole(1, 10**9), default=2048 * 2048, show_default=True, help="Of one picture.")
@click.option("--max-body-mb", type=Number(0.001, 10_000), default=32.0, show_default=True, help="Of one request.")
@click.option("--reload/--no-reload", default=True, show_default=True, help="Load a bundle that is exported again.")
@click.option(
    "--ray", is_flag=False, flag_value="local", metavar="[ADDRESS]",
    help="Make pictures in replicas on a Ray cluster: at ADDRESS, or without one on this machine's own.",
)  # fmt: skip
@click.option("--replicas", type=Whole(1, 10_000), help="Of each bundle, with --ray. Default: 1.")
@click.option(
    "--min-replicas", type=Whole(0, 10_000), help="Instead of --replicas: the fewest; 0 frees a bundle nobody asks for."
)
@click.option("--max-replicas", type=Whole(1, 10_000), help="The most, to which their number grows with the queue.")
@click.option(
    "--replica-target", type=Number(0, MILLION, min_open=True), default=2.0, show_default=True,
    help="Requests that each replica makes or that wait for it, before there are more replicas.",
)  # fmt: skip
@click.option("--replica-gpus", type=Number(0, 1000), default=0.0, show_default=True, help="Of each replica.")
@click.option("--log-prompts", is_flag=True, help="Write prompts to the log, which has none otherwise.")
def serve(
    bundles: tuple[str, ...], host: str, port: int, api_key: str | None, origins: tuple[str, ...],
    hosts: tuple[str, ...], engine: str | None, threads: int | None, runners: int, batch: int, queue: int,
    timeout_s: float, finish_s: float, memory_gb: float | None, steps: int, guidance: float, max_steps: int,
    max_pictures: int, max_pixels: int, max_body_mb: float, reload: bool, ray: str | None, replicas: int | None,
    min_replicas: int | None, max_replicas: int | None, replica_target: float, replica_gpus: float, log_prompts: bool,
) -> None:  # fmt: skip
    """Serve bundles over HTTP: OpenAI's images API, a web page, health and metrics. Needs no torch.

    A bundle is called by its folder's name, or by NAME. Several are served side by side. Stop it with Ctrl-C.

    Put --ray last, or write --ray=ADDRESS: what follows it is taken for the address.

    \b
    Examples:
      qdeploy serve demo/w8a8
      qdeploy serve fp32=demo/fp32 w8a8=demo/w8a8 --port 9000
      QDEPLOY_API_KEY=... qdeploy serve bundle --host 0.0.0.0 --memory-gb 4
      qdeploy serve bundle --replicas 2 --ray
    """
    from qdeploy.serve.cluster.settings import ReplicaSettings, choose_replicas
    from qdeploy.serve.loading import name_bundles
    from qdeploy.serve.room import RoomSettings
    from qdeploy.serve.service import LOOPBACK, ServiceSettings, choose_hosts, run_service
    from qdeploy.serve.web.settings import MIB, Limits, WebSettings

    if host not in LOOPBACK and api_key is None:
        click.echo(f"note: everybody who reaches {host} may make pictures; --api-key asks for a key", err=True)
    limits = Limits(max(max_steps, steps), max_pictures, max_pixels, body_bytes=int(max_body_mb * MIB))
    web = WebSettings(
        api_key=api_key, hosts=choose_hosts(host, hosts), origins=frozenset(origins), steps=steps,
        guidance_scale=guidance, timeout_s=timeout_s, log_prompts=log_prompts, limits=limits,
    )  # fmt: skip
    check_ray_options(ray)
    scaled = None
    if ray is not None:
        least, most = choose_replicas(replicas, min_replicas, max_replicas)
        scaled = ReplicaSettings(ray, least, most, replica_target, runners, replica_gpus)
    room = RoomSettings(queue, runners if scaled is None else scaled.senders, batch, RELOAD_S if reload else None)
    memory_bytes = None if memory_gb is None else int(memory_gb * 1e9)
    settings = ServiceSettings(engine, threads, memory_bytes, room, web, finish_s, scaled)
    run_service(name_bundles(bundles), settings, host, port, lambda url: click.echo(f"serving at {url}"))


def check_ray_options(ray: str | None) -> None:
    """UsageError of click for options that go only with --ray, or only without it."""
    if ray is not None:
        if is_typed("memory_gb"):
            raise click.UsageError(
                "--memory-gb bounds bundles in one process; on Ray give --min-replicas 0, which frees a bundle that "
                "nobody asks for."
            )
        return
    for name in ("replicas", "min_replicas", "max_replicas", "replica_target", "replica_gpus"):
        if is_typed(name):
            raise click.UsageError(f"--{name.replace('_', '-')} is about replicas on Ray; give --ray too.")
