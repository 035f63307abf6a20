"""Process and devices: command line, signals, mesh, processes, compilation cache."""
