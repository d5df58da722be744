"""The launcher and operator's command line. It starts the other packages as processes, above them all."""
