"""The ops in Triton: in each module a function a op, of the reference's name and signature. Imported on first use."""
