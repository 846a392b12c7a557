# The command in an image. A container of it serves a model at port 8080:
#
#   docker build --tag slimllm .
#   docker run --rm --init --publish 127.0.0.1:8080:8080 --volume "$PWD:/models:ro" slimllm \
#       /models/model.slim.gguf
#
# `--gpus all` lets it use NVIDIA GPUs. A hub id may stand in place of the path; what is fetched
# stays with `--volume slimllm:/cache`. `--env SLIMLLM_API_KEY` asks clients for a key, and
# `--entrypoint slimllm` gives the other commands.
FROM rust:1.95-slim-bookworm AS build
# Git tells the command its commit.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git
WORKDIR /source
COPY . .
RUN cargo build --release --locked --package slimllm

FROM debian:bookworm-slim
# The certificates that hubs are checked against.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home slimllm \
    && install --directory --owner slimllm /cache
COPY --from=build /source/target/release/slimllm /usr/local/bin/
USER slimllm
ENV HF_HOME=/cache NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 8080
ENTRYPOINT ["slimllm", "serve", "--host", "0.0.0.0"]
