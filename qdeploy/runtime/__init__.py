"""The torch-free runtime that services embed; :func:`qdeploy.load` is the way in."""
