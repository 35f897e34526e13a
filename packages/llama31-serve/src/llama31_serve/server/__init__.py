"""The server: gRPC front on the event loop, one engine thread, one detokeniser thread. Needs llama31-serve[server]."""
