# The image of a job on GKE (docs/gke.md), or anywhere with a container runtime:
#   docker build --tag=REGION-docker.pkg.dev/PROJECT/REPOSITORY/moe:1 .
#   docker build --build-arg=JAX='jax[cuda13]' ...        for NVIDIA GPUs (docs/slurm_and_gpus.md)
FROM python:3.12-slim

# The pair that the compile checks are held to: it pins its own libtpu (tools/dev.sh tpu).
ARG JAX="jax[tpu]==0.12.0.1"

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MOE_CACHE=/home/moe/.cache/moe
RUN useradd --create-home --uid=1000 moe
WORKDIR /app

# Before the code, so that another version of it does not install them again.
COPY requirements.txt ./
RUN python -m pip install --no-cache-dir "$JAX" --requirement=requirements.txt gcsfs

COPY pyproject.toml README.md ./
COPY moe ./moe
COPY configs ./configs
COPY tools ./tools

# By number: Kubernetes' runAsNonRoot cannot look a name up.
USER 1000
ENTRYPOINT ["python", "-m", "moe.train"]
