"""The .tflite format, as far as qdeploy writes it; read and written without LiteRT's package."""
