"""What the environment tells of the processes of this program, by JAX's own detection."""

from __future__ import annotations

from jax._src import clusters


def num_processes() -> int:
    """How many processes ``jax.distributed.initialize()`` would join without arguments.

    1 where no launcher is found, and it would fail. Slurm's tasks, Open MPI's ranks, an indexed Job
    of Kubernetes and the processes of :mod:`freeio_jax.launch` are found.
    """
    for environment in clusters.ClusterEnv._cluster_types:
        if not environment.opt_in_only_method and environment.is_env_present():
            return int(environment.get_process_count())
    return 1
