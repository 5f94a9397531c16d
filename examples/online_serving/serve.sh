#!/bin/sh
# Start the server with LoRA support. "$@" takes further flags (--port 8001).
exec aiolora serve smollm2-135m \
  --enable-lora \
  --lora-modules sql-lora=aiolora/smollm2-135m-sql adapter=examples/adapters/pirate "$@"
