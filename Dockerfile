# Firstlight in a container: packages by hash from requirements.lock, a user without rights, no data inside.
#   docker build -t firstlight .
#   docker run --rm --gpus all --ipc=host -v "$PWD/shards:/data" -v "$PWD/runs:/app/runs" firstlight \
#     train.py data.shards=/data trainer.devices=8 resume=true
# --ipc=host: loader workers hand batches over in shared memory, of which a container has 64 MiB by itself.
FROM python:3.12-slim

# torch.compile writes C++ on a CPU, and triton a small launcher on a GPU.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.lock .
RUN python -m pip install --no-cache-dir --require-hashes -r requirements.lock

COPY train.py sample.py ./
COPY conf conf
COPY data data
COPY evaluation evaluation
COPY models models
COPY scripts scripts
COPY web web

# A folder that is mounted here must be writable for the same number: chown 1000 runs, or docker run --user.
RUN useradd --uid 1000 --no-create-home trainer && mkdir runs shards && chown trainer runs shards
USER trainer
ENV PYTHONUNBUFFERED=1 HOME=/tmp

# exec form: signals reach train.py itself, so docker stop --time 300 saves before it ends.
ENTRYPOINT ["python"]
CMD ["train.py", "--help"]
