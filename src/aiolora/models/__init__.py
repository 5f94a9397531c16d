"""Networks: one decoder, families as data, weights streamed into it. Nothing here knows adapters or the engine."""
