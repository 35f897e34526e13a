"""The HTTP doors: TGI's, vLLM's, MindIE's and OpenAI's requests over the same generator as gRPC's."""
