"""The router: one asyncio process in front of many workers.

``launch_router`` is its command line; ``service.RouterService`` holds its parts together.
"""
