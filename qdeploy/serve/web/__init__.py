"""HTTP over the engine room: OpenAI's images API, AUTOMATIC1111's, a page, health and metrics."""
