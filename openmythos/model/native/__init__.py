"""Few rows at a time on the CPU: a layer as one operation, in compiled C."""
