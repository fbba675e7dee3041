# Triton Inference Server with qdeploy in its Python, over a repository of `qdeploy triton` at /models.
#   docker build -f examples/containers/triton.Dockerfile --build-arg TRITON=IMAGE:TAG -t qdeploy-triton examples/containers
#   docker run -p 8001:8001 -v ./repository:/models:ro qdeploy-triton
ARG TRITON
FROM ${TRITON}
RUN pip install --no-cache-dir qdeploy && useradd --create-home --uid 10001 qdeploy
USER 10001
EXPOSE 8000 8001 8002
HEALTHCHECK --start-period=60s CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready')"]
CMD ["tritonserver", "--model-repository=/models"]
