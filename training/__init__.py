"""How the built-in models were made: data, autoencoders, denoisers and their measurement; not part of the package."""
