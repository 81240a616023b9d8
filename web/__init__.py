"""The local page: arena and prompt studio, one starlette application served by uvicorn."""
