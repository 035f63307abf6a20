"""What every program stands on: command line, signals, devices, mesh, processes, compiled programs that are kept."""
