# A service of a bundle that is mounted read-only at /bundle, made by replicas on Ray Serve; it takes no torch.
#   docker build -f examples/containers/ray.Dockerfile -t qdeploy-ray examples/containers
#   docker run -p 8000:8000 --shm-size 512m -e QDEPLOY_API_KEY=... -v ./bundle:/bundle:ro qdeploy-ray
FROM python:3.12-slim
RUN pip install --no-cache-dir "qdeploy[serve-ray]" && useradd --create-home --uid 10001 qdeploy
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz')"]
ENTRYPOINT ["qdeploy", "serve", "--host", "0.0.0.0", "--ray=local"]
CMD ["--replicas", "2", "/bundle"]
