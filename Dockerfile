# kshot in a container, for a CPU or for CUDA:
#
#   docker build --target cpu  --build-arg TORCH_INDEX=ADDRESS --tag kshot:cpu .
#   docker build --target cuda --tag kshot:cuda .
#   mkdir --parents --mode 777 runs
#   docker run --rm --volume "$PWD/runs:/home/kshot/runs" kshot:cpu demo
#   docker run --rm --gpus all --volume "$PWD/runs:/home/kshot/runs" --volume kshot-cache:/cache kshot:cuda sweep blog-small --device cuda
#   docker run --rm --publish 127.0.0.1:8000:8000 --volume "$PWD/keys:/keys:ro" --volume kshot-cache:/cache \
#       kshot:cpu serve --host 0.0.0.0 --api-key-file /keys --state /cache/state
#
# runs: for results, which the container's own user writes. keys: a file with the keys that the server accepts, a line each.
# TORCH_INDEX: an index with PyTorch's builds for a CPU; without it the usual build is installed, which is larger.

FROM python:3.12-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    KSHOT_CACHE=/cache/kshot HF_HOME=/cache/huggingface XDG_STATE_HOME=/cache/state
WORKDIR /kshot
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY kshot kshot
COPY data data
COPY vlm vlm
COPY baselines baselines
COPY experiments experiments

FROM base AS cpu
ARG TORCH_INDEX=""
RUN if [ -n "$TORCH_INDEX" ]; then \
        pip install --constraint constraints.txt --index-url "$TORCH_INDEX" torch torchvision; \
    fi && pip install --constraint constraints.txt .
RUN useradd --create-home kshot && mkdir -p /cache && chown kshot /cache
USER kshot
WORKDIR /home/kshot
ENTRYPOINT ["kshot"]
CMD ["--help"]

# PyTorch's usual build brings CUDA's libraries; Triton compiles its kernels with a C compiler.
FROM base AS cuda
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --constraint constraints.txt .
RUN useradd --create-home kshot && mkdir -p /cache && chown kshot /cache
USER kshot
WORKDIR /home/kshot
ENTRYPOINT ["kshot"]
CMD ["--help"]
